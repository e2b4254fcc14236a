// Log-mel frames on the CPU: W frames at a time as a vector, rows of the result shared out among threads.
#pragma once

#include "tables.h"

namespace cat {

// Computes a call with up to `threads` threads, which end with it: nothing is left behind that a fork could break.
// Throws std::invalid_argument for a dtype that there is not, std::bad_alloc.
void fbank_cpu(const FbankTables& tables, const FbankCall& call, int threads);

// The instruction set in use: "avx512", "avx2" or "baseline" (what the compiler takes for granted).
const char* cpu_instruction_set();

// The instruction sets that this processor has, out of those that were compiled, the best first; null at the end.
const char* const* cpu_instruction_sets();

// Use another one of them, for tests. Throws std::invalid_argument.
void use_cpu_instruction_set(const char* name);

// One frame to compute: where its samples begin and where its row of mel bins goes.
struct CpuFrame {
  const void* samples;
  void* row;
};

// Compiled once for each instruction set (cpu_frames.cpp).
struct CpuFrames {
  const char* name;
  int width;  // frames at a time
  // Floats that `compute` needs for intermediate values, for an aligned block of memory.
  int64_t (*scratch)(const FbankShape& shape);
  // 1 to `width` frames.
  void (*compute)(const FbankView& tables, const FbankCall& call, const CpuFrame* frames, int count, float* scratch);
};

constexpr int kCpuAlignment = 64;

}  // namespace cat
