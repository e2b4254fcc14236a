// What a GPU thread does for log-mel frames, written for a `Thread` that is either a CUDA thread (cuda.cu) or one of an
// emulated block (tests/emulator.h), so that the source that runs on a GPU is tested without one.
//
//   int index()                    the thread's place in its block
//   int64_t block()                the block's place in the grid
//   char* shared()                 the block's shared memory, 16-byte aligned
//   void sync()                    waits for the block
//   void sync_warp()               waits for the warp of 32
//   float from_lane(float, int)    the value that the lane of that number has, among the 16 lanes of a frame
//
// Both programs write every row of the result that is theirs, the rows that only pad included.
#pragma once

#include <math.h>

#include "tables.h"

namespace cat {

constexpr int kBlockThreads = 128;

// Loops that are not worth the registers and instructions of being unrolled.
#ifdef __CUDACC__
#define CAT_ROLLED _Pragma("unroll 1")
#else
#define CAT_ROLLED
#endif

CAT_HD float log_energy(float energy) {
  const float floored = energy < kEnergyFloor ? kEnergyFloor : energy;  // unlike fmax, lets NaN through
#ifdef __CUDA_ARCH__
  return __logf(floored);  // absolute error below 2e-6 for what a mel energy can be
#else
  return logf(floored);
#endif
}

CAT_HD float sample(const void* waveform, Dtype dtype, int64_t i) {
  switch (dtype) {
    case Dtype::float16: return to_float(static_cast<const Half*>(waveform)[i]);
    case Dtype::bfloat16: return to_float(static_cast<const BFloat16*>(waveform)[i]);
    case Dtype::int16: return to_float(static_cast<const int16_t*>(waveform)[i]);
    default: return static_cast<const float*>(waveform)[i];
  }
}

template <class T>
struct alignas(4 * sizeof(T)) Four {
  T x[4];
};

// ---------------------------------------------------------------------------------------------------------------------
// Frames of 400 samples, 32 of them a block, 16 lanes a frame. The 256-point transform is 16 x 16: lane j transforms
// points j, j + 16, ... in its registers, a transposition through shared memory follows, and lane k has frequencies k,
// k + 16, ... Samples are read once and kept emphasised; the frame's mean, which they do not show, follows from their sum.

struct Block400 {
  static constexpr int kFrame = 400, kPoints = 256, kLanes = 16, kFrames = 32, kAtATime = kBlockThreads / kLanes;
  static constexpr int kRows = 13;   // of 16 points of the 16 x 16; the last is half full, further ones are zero
  static constexpr int kPitch = 17;  // of the transposition, so that rows and columns fall on different banks
  // From the buffer of one frame to that of the next: 16 banks further, so that the halves of a warp do not meet.
  static constexpr int kBuffer = 16 * kPitch + 8;

  // Shared memory: what a block's threads share, in this order.
  Complex<float>* buffer;  // (kAtATime, kBuffer) of each frame at a time: transposition, then powers
  Complex<float>* turn;    // (kPoints / 2)
  float* weight;           // (quads, 16, 4)
  float* emphasised;       // (span, rounded up to 4)
  float* first;            // (kFrames) of every frame, its first and last sample
  float* last;             // (kFrames)
  MelSpan* mel;            // (num_mel_bins, rounded up to 16)

  CAT_HD int span(const FbankShape& shape) { return ((kFrames - 1) * shape.frame_shift + kFrame + 3) / 4 * 4; }

  CAT_HD Block400 at(char* memory, const FbankView& tables) {
    Block400 block;
    block.buffer = reinterpret_cast<Complex<float>*>(memory);
    block.turn = block.buffer + kAtATime * kBuffer;
    block.weight = reinterpret_cast<float*>(block.turn + kPoints / 2);
    block.emphasised = block.weight + tables.quads * 64;
    block.first = block.emphasised + span(tables.shape);
    block.last = block.first + kFrames;
    block.mel = reinterpret_cast<MelSpan*>(block.last + kFrames);
    return block;
  }

  CAT_HD int bytes(const FbankView& tables) {
    return kAtATime * kBuffer * 8 + kPoints / 2 * 8 + tables.quads * 256 + span(tables.shape) * 4 + 2 * kFrames * 4 +
           (tables.shape.num_mel_bins + 15) / 16 * 64;
  }

  // What this program computes; everything else is `general_block`'s. Frames begin at even samples, which are read in
  // pairs, and shared memory is what every GPU has without asking.
  CAT_HD bool takes(const FbankView& tables) {
    const FbankShape& shape = tables.shape;
    return shape.frame_length == kFrame && shape.fft_length == 2 * kPoints && shape.frame_shift % 2 == 0 &&
           shape.frame_shift <= 512 && bytes(tables) <= 48 * 1024;
  }

  CAT_HD int64_t blocks_per_clip(int64_t frames) { return (frames + kFrames - 1) / kFrames; }
};

// x[i] - preemphasis x[i - 1] for the block's samples, and every frame's first and last sample. A frame's mean is still
// in there, so rounding is relative to what emphasis leaves of it.
template <class T, class Thread>
CAT_HD void load_samples(const FbankView& tables, const FbankCall& call, const Block400& block, int64_t clip,
                         int64_t first_frame, Thread& thread) {
  const FbankShape& shape = tables.shape;
  const int64_t begin = first_frame * shape.frame_shift;
  const T* const x = static_cast<const T*>(call.waveform) + clip * call.row_stride + begin;
  const int64_t left = call.samples - begin;
  const int end = left < Block400::span(shape) ? int(left) : Block400::span(shape);  // what lies behind is taken as 0
  const float kept = 1 - call.preemphasis;
  const bool aligned = reinterpret_cast<uintptr_t>(x) % (4 * sizeof(T)) == 0;
  CAT_ROLLED for (int i = 4 * thread.index(); i < Block400::span(shape); i += 4 * kBlockThreads) {
    Four<T> four;
    if (aligned && i + 4 <= end) {
      four = *reinterpret_cast<const Four<T>*>(x + i);
    } else {
      for (int j = 0; j < 4; ++j) four.x[j] = i + j < end ? x[i + j] : T{};
    }
    float previous = i <= end && begin + i > 0 ? to_float(x[i - 1]) * call.scale : 0.0f;
    for (int j = 0; j < 4; ++j) {
      const float current = to_float(four.x[j]) * call.scale;
      block.emphasised[i + j] = emphasise(current, previous, kept);
      previous = current;
    }
  }
  if (thread.index() < 2 * Block400::kFrames) {
    const int frame = thread.index() % Block400::kFrames;
    const bool is_last = thread.index() >= Block400::kFrames;
    const int i = frame * shape.frame_shift + (is_last ? Block400::kFrame - 1 : 0);
    (is_last ? block.last : block.first)[frame] = i < end ? to_float(x[i]) * call.scale : 0.0f;
  }
}

template <class Thread>
CAT_HD void load_block400(const FbankView& tables, const FbankCall& call, const Block400& block, int64_t clip,
                          int64_t first_frame, Thread& thread) {
  switch (call.input) {
    case Dtype::float32: load_samples<float>(tables, call, block, clip, first_frame, thread); break;
    case Dtype::float16: load_samples<Half>(tables, call, block, clip, first_frame, thread); break;
    case Dtype::bfloat16: load_samples<BFloat16>(tables, call, block, clip, first_frame, thread); break;
    case Dtype::int16: load_samples<int16_t>(tables, call, block, clip, first_frame, thread); break;
  }
  const int triangles = (tables.shape.num_mel_bins + 15) / 16 * 16;
  for (int i = thread.index(); i < Block400::kPoints / 2; i += kBlockThreads) block.turn[i] = tables.turn[i];
  for (int i = thread.index(); i < tables.quads * 64; i += kBlockThreads) block.weight[i] = tables.span_weight[i];
  for (int i = thread.index(); i < triangles; i += kBlockThreads) block.mel[i] = tables.span[i];
  thread.sync();
}

// The lane's points of the windowed frame: emphasised samples without their mean, times the window.
template <class Thread>
CAT_HD void windowed400(const FbankCall& call, const Block400& block, const Complex<float> (&window)[Block400::kRows],
                        int frame, int frame_shift, Thread& thread, Complex<float> (&z)[16]) {
  constexpr int kRows = Block400::kRows;
  const int lane = thread.index() % 16;
  const Complex<float>* const pairs = reinterpret_cast<const Complex<float>*>(block.emphasised + frame * frame_shift);
  const bool last_row = lane < Block400::kFrame / 2 - 16 * (kRows - 1);
  for (int i = 0; i < kRows; ++i) z[i] = i < kRows - 1 || last_row ? pairs[16 * i + lane] : Complex<float>{0, 0};
  // Nothing is carried over from the sample before the frame.
  if (lane == 0) z[0].re = block.first[frame] * (1 - call.preemphasis);
  float offset = 0;
  if (call.remove_dc) {
    float sum = 0;
    for (int i = 0; i < kRows; ++i) sum += z[i].re + z[i].im;
    for (int step = 8; step; step /= 2) sum += thread.from_lane(sum, lane ^ step);
    // sum = (1 - c) sum of x + c (last - first), and the emphasised mean is (1 - c) mean of x.
    offset = (sum - call.preemphasis * (block.last[frame] - block.first[frame])) * (1.0f / Block400::kFrame);
  }
  for (int i = 0; i < kRows; ++i) z[i] = {(z[i].re - offset) * window[i].re, (z[i].im - offset) * window[i].im};
  if (!last_row) z[kRows - 1] = {0, 0};
  for (int i = kRows; i < 16; ++i) z[i] = {0, 0};
}

// From the lane's frequencies of the 256-point transform to the powers of all 256 bins, in `power`.
template <class Thread>
CAT_HD void powers400(const Complex<float> (&z)[16], const Complex<float>* turn, Thread& thread, float* power) {
  const int lane = thread.index() % 16, partner = (16 - lane) % 16;
  for (int i = 0; i < 8; ++i) {
    // Bin k = lane + 16 i goes with bin 256 - k, which the partner has; lanes 0 and 8 have both.
    const Complex<float> others = z[place16(15 - i)], own = z[place16((16 - i) % 16)];
    const Complex<float> sent = {lane ? others.re : own.re, lane ? others.im : own.im};
    const Complex<float> high = {thread.from_lane(sent.re, partner), thread.from_lane(sent.im, partner)};
    const int k = lane + 16 * i;
    split(z[place16(i)], high, turn[k], power[k], power[256 - k]);
  }
  const Complex<float> middle = z[place16(8)];
  if (lane == 0) power[128] = 4 * (middle.re * middle.re + middle.im * middle.im);
}

// A triangle a lane, 16 triangles at a time: as many bins for each of them, so that no lane waits for another.
template <class Out, class Thread>
CAT_HD void mel400(const FbankCall& call, const Block400& block, const float* power, int bins, bool inside, Out* row,
                   Thread& thread) {
  const int lane = thread.index() % 16;
  const Four<float>* weight = reinterpret_cast<const Four<float>*>(block.weight) + lane;
  CAT_ROLLED for (int group = 0; group < bins; group += 16) {
    const int bin = group + lane;
    const MelSpan span = block.mel[bin];
    const Four<float>* four = reinterpret_cast<const Four<float>*>(power + span.first);
    float energy = 0;
    CAT_ROLLED for (int i = 0; i < span.quads; ++i, ++four, weight += 16) {
      const Four<float> p = *four, w = *weight;
      energy += p.x[0] * w.x[0] + p.x[1] * w.x[1] + p.x[2] * w.x[2] + p.x[3] * w.x[3];
    }
    if (row && bin < bins) assign(row[bin], inside ? (log_energy(energy) - call.mean) * call.factor : pad_value(call));
  }
}

template <class Out, class Thread>
CAT_HD void block400(const FbankView& tables, const FbankCall& call, Thread& thread) {
  const FbankShape& shape = tables.shape;
  const Block400 block = Block400::at(thread.shared(), tables);
  const int64_t per_clip = Block400::blocks_per_clip(call.frames);
  const int64_t clip = thread.block() / per_clip, first_frame = thread.block() % per_clip * Block400::kFrames;
  const int64_t frames = clip_frames(call, shape, clip);
  Out* const rows = static_cast<Out*>(call.output) + (clip * call.frames + first_frame) * shape.num_mel_bins;
  const int64_t rows_here = call.frames - first_frame;  // more than a block has, mostly
  if (first_frame >= frames) {
    const int64_t all = rows_here < Block400::kFrames ? rows_here : int64_t(Block400::kFrames);
    for (int i = thread.index(); i < all * shape.num_mel_bins; i += kBlockThreads) assign(rows[i], pad_value(call));
    return;
  }

  load_block400(tables, call, block, clip, first_frame, thread);
  const int lane = thread.index() % 16;
  Complex<float>* const buffer = block.buffer + thread.index() / 16 * Block400::kBuffer;
  Complex<float> window[Block400::kRows], twiddle[16];
  for (int i = 0; i < Block400::kRows; ++i) {
    const int k = 16 * i + lane;
    const bool within = k < Block400::kFrame / 2;
    window[i] = {within ? tables.window[2 * k] : 0.0f, within ? tables.window[2 * k + 1] : 0.0f};
  }
  for (int k = 1; k < 16; ++k) twiddle[k] = tables.twiddle16[16 * k + lane];

  CAT_ROLLED for (int frame = thread.index() / 16; frame < Block400::kFrames; frame += Block400::kAtATime) {
    Complex<float> z[16];
    windowed400(call, block, window, frame, shape.frame_shift, thread, z);
    dft16<Block400::kRows>(z);
    buffer[lane * Block400::kPitch] = z[0];
    for (int k = 1; k < 16; ++k) buffer[lane * Block400::kPitch + k] = z[place16(k)] * twiddle[k];
    thread.sync_warp();
    for (int j = 0; j < 16; ++j) z[j] = buffer[j * Block400::kPitch + lane];
    thread.sync_warp();
    dft16(z);
    float* const power = reinterpret_cast<float*>(buffer);
    powers400(z, block.turn, thread, power);
    thread.sync_warp();
    Out* const row = frame < rows_here ? rows + int64_t(frame) * shape.num_mel_bins : nullptr;
    mel400(call, block, power, shape.num_mel_bins, first_frame + frame < frames, row, thread);
    thread.sync_warp();
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Frames of any shape, one a block.

struct GeneralBlock {
  static constexpr int kLargestFft = 4096;  // whose two buffers fit into the shared memory that every GPU has

  CAT_HD int bytes(const FbankShape& shape) { return 2 * shape.fft_length * 4 + kBlockThreads * 4; }
};

// The sum of the threads' values, for all of them, in a fixed order.
template <class Thread>
CAT_HD float block_sum(float value, float* partial, Thread& thread) {
  partial[thread.index()] = value;
  for (int step = kBlockThreads / 2; step; step /= 2) {
    thread.sync();
    if (thread.index() < step) partial[thread.index()] += partial[thread.index() + step];
  }
  thread.sync();
  const float sum = partial[0];
  thread.sync();
  return sum;
}

template <class Out, class Thread>
CAT_HD void general_block(const FbankView& tables, const FbankCall& call, Thread& thread) {
  const FbankShape& shape = tables.shape;
  const int me = thread.index(), n = shape.fft_length / 2, length = shape.frame_length;
  float* x = reinterpret_cast<float*>(thread.shared());
  float* y = x + shape.fft_length;
  float* const partial = y + shape.fft_length;

  const int64_t clip = thread.block() / call.frames, t = thread.block() % call.frames;
  Out* const row = static_cast<Out*>(call.output) + thread.block() * shape.num_mel_bins;
  if (t >= clip_frames(call, shape, clip)) {
    for (int f = me; f < shape.num_mel_bins; f += kBlockThreads) assign(row[f], pad_value(call));
    return;
  }
  const int64_t begin = clip * call.row_stride + t * shape.frame_shift;
  for (int i = me; i < length; i += kBlockThreads) x[i] = sample(call.waveform, call.input, begin + i) * call.scale;
  float mean = 0;
  if (call.remove_dc) {
    // Twice: the first mean is rounded at the size of the offset, what it leaves is rounded at the size of the rest.
    float sum = 0;
    for (int i = me; i < length; i += kBlockThreads) sum += x[i];
    const float offset = block_sum(sum, partial, thread) / length;
    sum = 0;
    for (int i = me; i < length; i += kBlockThreads) sum += x[i] -= offset;
    mean = block_sum(sum, partial, thread) / length;
  }
  thread.sync();
  for (int i = me; i < 2 * n; i += kBlockThreads) {
    const float before = i < length ? x[i ? i - 1 : 0] - mean : 0.0f;
    y[i] = i < length ? emphasise(x[i] - mean, before, 1 - call.preemphasis) * tables.window[i] : 0.0f;
  }
  thread.sync();

  Complex<float>*z = reinterpret_cast<Complex<float>*>(y), *other = reinterpret_cast<Complex<float>*>(x);
  int stride = 1;
  for (; 4 * stride <= n; stride *= 4) {
    for (int j = me; j < n / 4; j += kBlockThreads) stockham4(z, other, tables.twiddle, n, stride, j);
    Complex<float>* const result = other;
    other = z, z = result;
    thread.sync();
  }
  if (stride < n) {
    for (int j = me; j < n / 2; j += kBlockThreads) stockham2(z, other, n, j);
    Complex<float>* const result = other;
    other = z, z = result;
    thread.sync();
  }
  float* const power = reinterpret_cast<float*>(other);
  for (int k = me; k <= n / 2; k += kBlockThreads) {
    float low, high;
    split(z[k], z[k ? n - k : 0], tables.turn[k], low, high);
    power[k] = low;
    if (k) power[n - k] = high;  // for k = 0 it is the Nyquist frequency's, which is not used
  }
  thread.sync();
  for (int f = me; f < shape.num_mel_bins; f += kBlockThreads) {
    float energy = power[0] * 0.0f;  // or not a number, which triangles without a bin must show too
    for (int k = tables.segment[f]; k < tables.segment[f + 1]; ++k) energy += power[k] * tables.weight[k].rise;
    for (int k = tables.segment[f + 1]; k < tables.segment[f + 2]; ++k) energy += power[k] * tables.weight[k].fall;
    assign(row[f], (log_energy(energy) - call.mean) * call.factor);
  }
}

}  // namespace cat
