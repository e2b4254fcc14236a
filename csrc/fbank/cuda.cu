#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "block.h"
#include "cuda.h"

namespace cat {
namespace {

struct CudaThread {
  char* memory;
  __device__ __forceinline__ int index() const { return threadIdx.x; }
  __device__ __forceinline__ int64_t block() const { return blockIdx.x; }
  __device__ __forceinline__ char* shared() const { return memory; }
  __device__ __forceinline__ void sync() const { __syncthreads(); }
  __device__ __forceinline__ void sync_warp() const { __syncwarp(); }
  __device__ __forceinline__ float from_lane(float value, int lane) const {
    return __shfl_sync(0xffffffffu, value, lane, 16);
  }
};

extern __shared__ float4 shared_memory[];

// Four blocks on a multiprocessor: 128 registers a thread.
template <class Out>
__global__ void __launch_bounds__(kBlockThreads, 4)
    fbank_400(const __grid_constant__ FbankView tables, const __grid_constant__ FbankCall call) {
  CudaThread thread{reinterpret_cast<char*>(shared_memory)};
  block400<Out>(tables, call, thread);
}

template <class Out>
__global__ void __launch_bounds__(kBlockThreads)
    fbank_general(const __grid_constant__ FbankView tables, const __grid_constant__ FbankCall call) {
  CudaThread thread{reinterpret_cast<char*>(shared_memory)};
  general_block<Out>(tables, call, thread);
}

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("fbank: ") + what + " failed: " + cudaGetErrorString(error));
  }
}

template <class Out>
void launch(const FbankView& tables, const FbankCall& call, cudaStream_t stream) {
  const FbankShape& shape = tables.shape;
  const bool fast = Block400::takes(tables);
  const int64_t blocks = call.clips * (fast ? Block400::blocks_per_clip(call.frames) : call.frames);
  if (blocks == 0) return;
  if (blocks > 0x7fffffff) {
    throw std::invalid_argument("fbank: " + std::to_string(call.clips) + " clips of " + std::to_string(call.frames) +
                                " frames are more than one launch computes; split the batch");
  }
  if (fast) {
    fbank_400<Out><<<unsigned(blocks), kBlockThreads, Block400::bytes(tables), stream>>>(tables, call);
  } else {
    fbank_general<Out><<<unsigned(blocks), kBlockThreads, GeneralBlock::bytes(shape), stream>>>(tables, call);
  }
  check(cudaGetLastError(), "the launch");
}

}  // namespace

void fbank_cuda(const FbankTables& tables, const void* device_tables, const FbankCall& call, int device, void* stream) {
  if (tables.shape.fft_length > GeneralBlock::kLargestFft) {
    throw std::invalid_argument("fbank: an FFT of " + std::to_string(tables.shape.fft_length) +
                                " points; the CUDA kernel computes up to " + std::to_string(GeneralBlock::kLargestFft));
  }
  // This library's CUDA runtime is its own, linked in statically: it must be told the device.
  check(cudaSetDevice(device), "cudaSetDevice");
  const FbankView view = tables.view(device_tables);
  switch (call.dtype) {
    case Dtype::float32: return launch<float>(view, call, static_cast<cudaStream_t>(stream));
    case Dtype::float16: return launch<Half>(view, call, static_cast<cudaStream_t>(stream));
    case Dtype::bfloat16: return launch<BFloat16>(view, call, static_cast<cudaStream_t>(stream));
    case Dtype::int16: throw std::invalid_argument("fbank: the result cannot be int16");
  }
}

std::string cuda_problem(int device) {
  int driver = 0;
  cudaFuncAttributes attributes;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver / 1000 < CUDART_VERSION / 1000) {
    return "the GPU's driver is for CUDA " + std::to_string(driver / 1000) + "." + std::to_string(driver % 1000 / 10) +
           ", too old for this build of the extension";
  }
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, fbank_400<float>);
  if (error == cudaSuccess) return "";
  cudaGetLastError();  // so that PyTorch does not find it
  return std::string("the extension's kernels cannot run on this GPU: ") + cudaGetErrorString(error);
}

}  // namespace cat
