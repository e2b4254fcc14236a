// The kernels and their launches. Nothing here calls the C++ library: nvcc's host compiler may have another one than the
// compiler of all the rest, as in wheels (docs/release.md). Words and exceptions are cuda.cpp's.
#include <cuda_runtime.h>

#include "block.h"
#include "launch.h"

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

template <class Out>
cudaError_t start(const FbankView& tables, const FbankCall& call, unsigned blocks, cudaStream_t stream) {
  if (Block400::takes(tables)) {
    fbank_400<Out><<<blocks, kBlockThreads, Block400::bytes(tables), stream>>>(tables, call);
  } else {
    fbank_general<Out><<<blocks, kBlockThreads, GeneralBlock::bytes(tables.shape), stream>>>(tables, call);
  }
  return cudaGetLastError();
}

Failure failure(cudaError_t error, const char* what) {
  return error == cudaSuccess ? Failure{} : Failure{what, cudaGetErrorString(error)};
}

}  // namespace

Failure launch(const FbankView& tables, const FbankCall& call, unsigned blocks, int device, void* stream) {
  // This library's CUDA runtime is its own, linked in statically: it must be told the device.
  if (const Failure failed = failure(cudaSetDevice(device), "cudaSetDevice"); failed.what) return failed;
  cudaError_t error = cudaErrorInvalidValue;
  switch (call.dtype) {
    case Dtype::float32: error = start<float>(tables, call, blocks, static_cast<cudaStream_t>(stream)); break;
    case Dtype::float16: error = start<Half>(tables, call, blocks, static_cast<cudaStream_t>(stream)); break;
    case Dtype::bfloat16: error = start<BFloat16>(tables, call, blocks, static_cast<cudaStream_t>(stream)); break;
    case Dtype::int16: break;
  }
  return failure(error, "the launch");
}

int cuda_version() { return CUDART_VERSION; }

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

Failure try_kernel(int device) {
  cudaFuncAttributes attributes;
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, fbank_400<float>);
  if (error != cudaSuccess) cudaGetLastError();  // so that PyTorch does not find it
  return failure(error, "the first kernel");
}

}  // namespace cat
