// The CPU implementation, with every instruction set of this processor: against the definition in double precision, the
// same bits whatever the threads and the neighbours of a frame.

#include <stdexcept>

#include "../fbank/cpu.h"
#include "reference.h"

namespace {

void run(reference::Case& c, int threads) {
  c.finish();
  cat::fbank_cpu(c.settings.tables(), c.call, threads);
}

void check_case(reference::Case c) {
  run(c, 1);
  reference::check_result(c);
  const std::vector<unsigned char> alone = c.output;
  run(c, 3);
  CHECK(c.output == alone) << c.name << ": the result depends on the number of threads";
}

// A clip gives the same bits alone and among others.
void check_neighbours() {
  reference::CaseOptions o;
  o.clips = 7, o.samples = 5000;
  reference::Case all = reference::make_case("neighbours", {}, o);
  run(all, 2);
  reference::Case one = all;
  one.call.clips = 1;
  for (int64_t clip = 0; clip < o.clips; ++clip) {
    one.waveform.assign(all.waveform.begin() + clip * o.samples * 4, all.waveform.begin() + (clip + 1) * o.samples * 4);
    run(one, 1);
    for (int64_t t = 0; t < all.call.frames; ++t) {
      for (int f = 0; f < 128; ++f) {
        CHECK(one.result(0, t, f) == all.result(clip, t, f)) << "clip " << clip << " frame " << t << " bin " << f;
      }
    }
  }
}

void check_nan() {
  reference::CaseOptions o;
  o.clips = 1, o.samples = 1200;
  reference::Case c = reference::make_case("NaN", {}, o);
  const float nan = std::nanf("");
  std::memcpy(c.waveform.data() + 4 * 559, &nan, 4);
  run(c, 1);
  for (int t = 0; t < 6; ++t) {
    const bool hit = 160 * t <= 559 && 559 < 160 * t + 400;
    for (int f = 0; f < 128; ++f) CHECK(std::isnan(c.result(0, t, f)) == hit) << "frame " << t << " bin " << f;
  }
}

void check_silence() {
  reference::CaseOptions o;
  o.clips = 1, o.samples = 1200;
  reference::Case c = reference::make_case("silence", {}, o);
  std::fill(c.waveform.begin(), c.waveform.end(), 0);
  run(c, 1);
  for (int t = 0; t < 6; ++t) {
    for (int f = 0; f < 128; ++f) CHECK(float(c.result(0, t, f)) == -15.942385f) << "frame " << t << " bin " << f;
  }
}

// More threads than there is work, more rows than a thread takes at a time, and nothing at all.
void check_sizes() {
  reference::CaseOptions o;
  o.clips = 1, o.samples = 48000;
  reference::Case c = reference::make_case("300 frames", {}, o);
  run(c, 64);
  reference::check_result(c);
  c.call.clips = 0;
  run(c, 4);
  CHECK(std::all_of(c.output.begin(), c.output.end(), [](unsigned char b) { return b == reference::Case::kGuardByte; }))
      << "an empty batch was written";
}

void check_errors() {
  for (int what = 0; what < 2; ++what) {
    try {
      reference::Case c = reference::make_case("error", {}, {});
      if (what) cat::use_cpu_instruction_set("mmx");
      c.call.dtype = cat::Dtype::int16;
      cat::fbank_cpu(c.settings.tables(), c.call, 1);
      CHECK(false) << "no error";
    } catch (const std::invalid_argument&) {
    }
  }
}

}  // namespace

int main() {
  for (const char* const* name = cat::cpu_instruction_sets(); *name; ++name) {
    cat::use_cpu_instruction_set(*name);
    std::printf("%s\n", cat::cpu_instruction_set());
    for (reference::Case& c : reference::cases(1 << 20)) {
      c.name += std::string(", ") + *name;
      check_case(std::move(c));
    }
    check_neighbours();
    check_nan();
    check_silence();
    check_sizes();
  }
  check_errors();
  return check::result("test_cpu");
}
