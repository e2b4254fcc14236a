#include "cpu.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>
#ifdef CAT_X86_ISAS
#include <cpuid.h>
#endif

namespace cat {

extern const CpuFrames cpu_frames_baseline;
#ifdef CAT_X86_ISAS
extern const CpuFrames cpu_frames_avx2;
extern const CpuFrames cpu_frames_avx512;
#endif

namespace {

// Rows of the result that a thread takes at a time. Measured: below 64 the last, partly filled vector costs, and from
// 512 on threads wait for the last one.
constexpr int64_t kRowsAtATime = 128;

#ifdef CAT_X86_ISAS
struct Processor {
  bool avx2 = false, avx512 = false;
};

// What the processor has, and the operating system keeps when threads take turns. Not by __builtin_cpu_supports, which is
// false for everything in the compiler that builds the wheels (zig's runtime library only pretends to have it).
Processor processor() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned first = bit_OSXSAVE | bit_AVX | bit_FMA | bit_F16C;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & first) != first) return {};
  unsigned kept = 0, upper = 0;
  __asm__("xgetbv" : "=a"(kept), "=d"(upper) : "c"(0));
  constexpr unsigned ymm = 0x06, zmm = 0xe6;  // bits of XCR0
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & bit_AVX2) || (kept & ymm) != ymm) return {};
  constexpr unsigned wide = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
  return {true, (b & wide) == wide && (kept & zmm) == zmm};
}
#endif

// The instruction sets of this processor, the best first.
std::vector<const CpuFrames*> supported() {
  std::vector<const CpuFrames*> found;
#ifdef CAT_X86_ISAS
  const Processor here = processor();
  if (here.avx512) found.push_back(&cpu_frames_avx512);
  if (here.avx2) found.push_back(&cpu_frames_avx2);
#endif
  found.push_back(&cpu_frames_baseline);
  return found;
}

std::atomic<const CpuFrames*>& in_use() {
  static std::atomic<const CpuFrames*> frames{supported().front()};
  return frames;
}

size_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

struct Scratch {
  explicit Scratch(int64_t floats)
      : memory(static_cast<float*>(::operator new(size_t(floats) * sizeof(float), std::align_val_t{kCpuAlignment}))) {}
  ~Scratch() { ::operator delete(memory, std::align_val_t{kCpuAlignment}); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* memory;
};

template <class T>
void pad(T* row, int bins, float value) {
  for (int f = 0; f < bins; ++f) assign(row[f], value);
}

// Rows [begin, end) of the (clips x frames) rows of the result.
void compute_rows(const CpuFrames& isa, const FbankView& tables, const FbankCall& call, int64_t begin, int64_t end,
                  float* scratch) {
  const FbankShape& shape = tables.shape;
  const char* const waveform = static_cast<const char*>(call.waveform);
  char* const output = static_cast<char*>(call.output);
  const int64_t row_bytes = shape.num_mel_bins * int64_t(size_of(call.dtype));
  CpuFrame frames[16];
  int count = 0;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t clip = row / call.frames, t = row % call.frames;
    void* const to = output + row * row_bytes;
    if (t < clip_frames(call, shape, clip)) {
      const int64_t first = clip * call.row_stride + t * shape.frame_shift;
      frames[count++] = {waveform + first * int64_t(size_of(call.input)), to};
      if (count == isa.width) isa.compute(tables, call, frames, count, scratch), count = 0;
      continue;
    }
    const float value = pad_value(call);
    switch (call.dtype) {
      case Dtype::float16: pad(static_cast<Half*>(to), shape.num_mel_bins, value); break;
      case Dtype::bfloat16: pad(static_cast<BFloat16*>(to), shape.num_mel_bins, value); break;
      default: pad(static_cast<float*>(to), shape.num_mel_bins, value);
    }
  }
  if (count) isa.compute(tables, call, frames, count, scratch);
}

// Takes the next rows until there are none. What it throws is kept for the caller's thread.
struct Work {
  Work(const CpuFrames& isa, const FbankTables& tables, const FbankCall& call)
      : isa(isa), tables(tables.view()), call(call) {}

  const CpuFrames& isa;
  const FbankView tables;
  const FbankCall& call;
  std::atomic<int64_t> next{0};
  std::mutex lock;
  std::exception_ptr error;

  void operator()() {
    try {
      const Scratch scratch(isa.scratch(tables.shape));
      const int64_t rows = call.clips * call.frames;
      for (int64_t begin; (begin = next.fetch_add(kRowsAtATime)) < rows;) {
        compute_rows(isa, tables, call, begin, std::min(begin + kRowsAtATime, rows), scratch.memory);
      }
    } catch (...) {
      const std::lock_guard<std::mutex> guard(lock);
      error = std::current_exception();
    }
  }
};

}  // namespace

void fbank_cpu(const FbankTables& tables, const FbankCall& call, int threads) {
  if (call.dtype == Dtype::int16) throw std::invalid_argument("fbank: the result cannot be int16");
  Work work(*in_use().load(), tables, call);
  const int64_t pieces = (call.clips * call.frames + kRowsAtATime - 1) / kRowsAtATime;
  std::vector<std::thread> others;
  try {
    while (int64_t(others.size()) + 1 < std::min<int64_t>(threads, pieces)) others.emplace_back(std::ref(work));
  } catch (const std::system_error&) {
    // No more threads to be had: those that there are do the work.
  }
  work();
  for (std::thread& thread : others) thread.join();
  if (work.error) std::rethrow_exception(work.error);
}

const char* cpu_instruction_set() { return in_use().load()->name; }

const char* const* cpu_instruction_sets() {
  static const std::vector<const char*> names = [] {
    std::vector<const char*> all;
    for (const CpuFrames* frames : supported()) all.push_back(frames->name);
    all.push_back(nullptr);
    return all;
  }();
  return names.data();
}

void use_cpu_instruction_set(const char* name) {
  for (const CpuFrames* frames : supported()) {
    if (std::strcmp(frames->name, name) == 0) {
      in_use() = frames;
      return;
    }
  }
  throw std::invalid_argument(std::string("this processor or this build has no instruction set ") + name);
}

}  // namespace cat
