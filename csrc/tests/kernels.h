// The CUDA kernels' own source, run by emulated thread blocks.
#pragma once

#include "../fbank/block.h"
#include "emulator.h"
#include "reference.h"

namespace kernels {

template <class Out>
void run(const cat::FbankView& tables, const cat::FbankCall& call, bool fast, unsigned seed) {
  const int64_t blocks = call.clips * (fast ? cat::Block400::blocks_per_clip(call.frames) : call.frames);
  const int bytes = fast ? cat::Block400::bytes(tables) : cat::GeneralBlock::bytes(tables.shape);
  emulator::Block block(cat::kBlockThreads, size_t(bytes), seed);
  for (int64_t i = 0; i < blocks; ++i) {
    block.run(i, [&](emulator::Thread& thread) {
      fast ? cat::block400<Out>(tables, call, thread) : cat::general_block<Out>(tables, call, thread);
    });
  }
}

// A case by the 400-sample kernel (`fast`) or the general one; `seed` is the order of the threads.
inline void run(const reference::Case& c, bool fast, unsigned seed) {
  const cat::FbankTables tables = c.settings.tables();
  switch (c.call.dtype) {
    case cat::Dtype::float16: return run<cat::Half>(tables.view(), c.call, fast, seed);
    case cat::Dtype::bfloat16: return run<cat::BFloat16>(tables.view(), c.call, fast, seed);
    default: return run<float>(tables.view(), c.call, fast, seed);
  }
}

}  // namespace kernels
