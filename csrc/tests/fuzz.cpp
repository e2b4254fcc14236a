// Random settings, lengths and dtypes, on the CPU and in emulated thread blocks, each against the definition in double
// precision:  fuzz [rounds] [seed]. A failure names the round and its seed, with which it can be repeated.

#include <cstdlib>

#include "../fbank/cpu.h"
#include "kernels.h"

namespace {

using cat::Dtype;

class Fuzz {
 public:
  explicit Fuzz(unsigned seed) : seed_(seed), random_(seed) {}

  reference::Case make() {
    reference::Settings s;
    const double rates[] = {8000, 16000, 22050, 44100};
    s.sample_rate = rates[below(4)];
    s.shape.frame_length = below(3) ? 400 : 2 + below(1100);
    s.shape.frame_shift = below(2) ? 160 : 1 + below(500);
    for (s.shape.fft_length = 1; s.shape.fft_length < s.shape.frame_length; s.shape.fft_length *= 2) {
    }
    s.shape.num_mel_bins = 1 + below(below(2) ? 140 : 20);
    s.low_freq = below(3) * 20;
    s.high_freq = below(2) ? s.sample_rate / 2 : s.low_freq + 1 + below(int(s.sample_rate / 2 - s.low_freq) - 1);
    s.window = cat::Window(below(3));
    reference::CaseOptions o;
    o.clips = 1 + below(3);
    o.samples = s.shape.frame_length + below(40 * s.shape.frame_shift);
    o.extra_stride = below(3);
    o.frames = below(2) ? 0 : 1 + below(50);
    if (below(2)) {
      for (int64_t i = 0; i < o.clips; ++i) o.lengths.push_back(below(int(o.samples) + 10) - 3);
    }
    o.input = Dtype(below(4)), o.dtype = Dtype(below(3));
    o.preemphasis = below(2) ? 0.97 : below(100) / 100.0;
    o.remove_dc = below(4) != 0;
    o.scale = below(2) ? 1 : 32768;
    if (below(2)) o.mean = -4.268, o.factor = 0.109;
    o.seed = random_();
    return reference::make_case("seed " + std::to_string(seed_), s, o);
  }

 private:
  int below(int n) { return int(random_() % unsigned(n)); }
  unsigned seed_;
  std::mt19937 random_;
};

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 60;
  const unsigned first = argc > 2 ? unsigned(std::atoi(argv[2])) : 0;
  for (unsigned seed = first; seed < first + unsigned(rounds); ++seed) {
    reference::Case c = Fuzz(seed).make();
    const std::string name = c.name;
    for (const char* const* isa = cat::cpu_instruction_sets(); *isa; ++isa) {
      cat::use_cpu_instruction_set(*isa);
      c.finish();
      c.name = name + ", " + *isa;
      cat::fbank_cpu(c.settings.tables(), c.call, 1 + int(seed % 3));
      reference::check_result(c);
    }
    if (c.settings.shape.fft_length > cat::GeneralBlock::kLargestFft) continue;
    const bool fast = cat::Block400::takes(c.settings.tables().view());
    c.finish();
    c.name = name + (fast ? ", 400-sample kernel" : ", general kernel");
    kernels::run(c, fast, 0);
    reference::check_result(c, fast);
  }
  return check::result("fuzz");
}
