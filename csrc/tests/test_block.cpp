// The CUDA kernels' own source, run by emulated thread blocks: against the definition in double precision, and the same
// bits whatever the order of the threads.

#include <cstring>

#include "kernels.h"

namespace {

using cat::FbankCall;
using cat::FbankView;

void check_kernel(reference::Case c, bool fast) {
  c.finish();
  c.name += fast ? ", 400-sample kernel" : ", general kernel";
  kernels::run(c, fast, 1);
  reference::check_result(c, fast);
  const std::vector<unsigned char> before = c.output;
  c.finish();
  kernels::run(c, fast, 2);
  CHECK(c.output == before) << c.name << ": the result depends on the order of the threads";
}

void check_nan(bool fast) {
  reference::CaseOptions o;
  o.clips = 1, o.samples = 1200;
  reference::Case c = reference::make_case("NaN", {}, o);
  const float nan = std::nanf("");
  std::memcpy(c.waveform.data() + 4 * 559, &nan, 4);  // the last sample of frame 1, the one before frame 3.5
  std::memcpy(c.waveform.data() + 4 * 159, &nan, 4);  // in frame 0; just before frame 1
  kernels::run(c, fast, 1);
  for (int t = 0; t < 6; ++t) {
    bool hit = false;
    for (int i : {159, 559}) hit |= 160 * t <= i && i < 160 * t + 400;
    for (int f = 0; f < 128; ++f) {
      const double value = c.result(0, t, f);
      CHECK(std::isnan(value) == hit) << "fast " << fast << " frame " << t << " bin " << f << ": " << value;
    }
  }
}

void check_choice() {
  reference::Settings s;
  const auto takes = [&] { return cat::Block400::takes(s.tables().view()); };
  CHECK(takes()) << "the standard shape";
  CHECK(cat::Block400::bytes(s.tables().view()) <= 56 * 1024) << "four blocks must fit into 228 KiB";
  s.shape.frame_shift = 161;
  CHECK(!takes()) << "an odd shift";
  s.shape = {400, 400, 512, 128};
  CHECK(!takes()) << "too much shared memory";
  s.shape = {400, 160, 1024, 128};
  CHECK(!takes()) << "another FFT";
  s.shape = {4000, 160, cat::GeneralBlock::kLargestFft, 128};
  CHECK(cat::GeneralBlock::bytes(s.shape) <= 48 * 1024) << "more than every GPU has";
}

// Lane maps: the lanes' frequencies of a 256-point transform become the powers of 256 bins, each in its place.
void check_powers() {
  std::mt19937 random(0);
  std::normal_distribution<double> normal;
  reference::Spectrum x(512), z(256);
  for (auto& value : x) value = normal(random);
  for (size_t k = 0; k < 256; ++k) z[k] = {x[2 * k].real(), x[2 * k + 1].real()};
  const reference::Spectrum X = reference::fft(x), Z = reference::fft(z);
  const cat::FbankTables tables = reference::Settings{}.tables();
  std::vector<std::vector<float>> power(8, std::vector<float>(257, std::nanf("")));
  emulator::Block block(cat::kBlockThreads, 0, 3);
  block.run(0, [&](emulator::Thread& thread) {
    cat::Complex<float> own[16];
    for (int i = 0; i < 16; ++i) {
      const std::complex<double> value = Z[size_t(thread.index() % 16 + 16 * i)];
      own[cat::place16(i)] = {float(value.real()), float(value.imag())};
    }
    cat::powers400(own, tables.view().turn, thread, power[size_t(thread.index() / 16)].data());
  });
  for (const std::vector<float>& found : power) {
    for (size_t k = 0; k < 256; ++k) {
      const double expected = 4 * std::norm(X[k]);
      CHECK(std::fabs(found[k] - expected) < 1e-6 * (expected + 1000)) << "bin " << k << ": " << found[k] << ", not " << expected;
    }
  }
}

// Mel spans: the sixteen lanes' triangles, all of the same length, against the definition.
void check_mel(int bins, double low_freq) {
  reference::Settings settings;
  settings.shape.num_mel_bins = bins;
  settings.low_freq = low_freq;
  const cat::FbankTables tables = settings.tables();
  const FbankView view = tables.view();
  const std::string name = std::to_string(bins) + " bins from " + std::to_string(low_freq) + " Hz";
  std::mt19937 random(0);
  std::uniform_real_distribution<float> uniform(1, 2);
  alignas(16) float power[256];
  for (float& value : power) value = uniform(random);
  std::vector<float> row(size_t(bins) + 1, -1);
  cat::Block400 shared{};
  std::vector<cat::MelSpan> mel(view.span, view.span + (bins + 15) / 16 * 16);
  std::vector<float> weight(view.span_weight, view.span_weight + view.quads * 64);
  shared.weight = weight.data(), shared.mel = mel.data();
  for (const cat::MelSpan& span : mel) CHECK(span.first + 4 * span.quads <= 256) << name << ": behind the spectrum";
  FbankCall call{};
  call.factor = 1;
  emulator::Block block(cat::kBlockThreads, 0, 4);
  block.run(0, [&](emulator::Thread& thread) {
    float* const to = thread.index() < 16 ? row.data() : nullptr;
    cat::mel400(call, shared, power, bins, true, to, thread);
  });
  for (int f = 0; f < bins; ++f) {
    double energy = 0;
    for (int k = 0; k < 256; ++k) energy += power[k] / 4 * reference::mel_weight(settings, k, f);
    const double expected = std::log(std::max(energy, double(cat::kEnergyFloor)));
    CHECK(std::fabs(row[size_t(f)] - expected) < 1e-5) << name << ", bin " << f << ": " << row[size_t(f)];
  }
  CHECK(row[size_t(bins)] == -1) << name << ": written behind the row";
}

}  // namespace

int main() {
  check_choice();
  check_powers();
  for (int bins : {1, 14, 15, 16, 17, 31, 128, 200}) {
    check_mel(bins, 20);
    check_mel(bins, 7000);
  }
  check_nan(true);
  check_nan(false);
  for (const reference::Case& c : reference::cases(cat::GeneralBlock::kLargestFft)) {
    if (cat::Block400::takes(c.settings.tables().view())) check_kernel(c, true);
    check_kernel(c, false);
  }
  return check::result("test_block");
}
