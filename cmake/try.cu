// What csrc/fbank/cuda.cu takes of CUDA and C++17, so that an nvcc that is too old for it is told from one that works.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

struct Call {
  float* out;
};

template <class T>
__global__ void __launch_bounds__(128, 4) kernel(const __grid_constant__ Call call) {
  if constexpr (sizeof(T) == 4) *call.out = __shfl_sync(0xffffffffu, float(threadIdx.x), 0, 16);
}

int main() {
  kernel<float><<<1, 1>>>(Call{nullptr});
  return int(std::vector<std::string>().size());
}
