#include "cuda.h"

#include <stdexcept>
#include <string>

#include "block.h"
#include "launch.h"

namespace cat {

void fbank_cuda(const FbankTables& tables, const void* device_tables, const FbankCall& call, int device, void* stream) {
  if (tables.shape.fft_length > GeneralBlock::kLargestFft) {
    throw std::invalid_argument("fbank: an FFT of " + std::to_string(tables.shape.fft_length) +
                                " points; the CUDA kernel computes up to " + std::to_string(GeneralBlock::kLargestFft));
  }
  if (call.dtype == Dtype::int16) throw std::invalid_argument("fbank: the result cannot be int16");
  const FbankView view = tables.view(device_tables);
  const int64_t blocks = call.clips * (Block400::takes(view) ? Block400::blocks_per_clip(call.frames) : call.frames);
  if (blocks == 0) return;
  if (blocks > 0x7fffffff) {
    throw std::invalid_argument("fbank: " + std::to_string(call.clips) + " clips of " + std::to_string(call.frames) +
                                " frames are more than one launch computes; split the batch");
  }
  const Failure failed = launch(view, call, unsigned(blocks), device, stream);
  if (failed.what) throw std::runtime_error(std::string("fbank: ") + failed.what + " failed: " + failed.message);
}

std::string cuda_problem(int device) {
  const int driver = driver_version();
  if (driver / 1000 < cuda_version() / 1000) {
    return "the GPU's driver is for CUDA " + std::to_string(driver / 1000) + "." + std::to_string(driver % 1000 / 10) +
           ", too old for this build of the extension";
  }
  const Failure failed = try_kernel(device);
  return failed.what ? std::string("the extension's kernels cannot run on this GPU: ") + failed.message : "";
}

}  // namespace cat
