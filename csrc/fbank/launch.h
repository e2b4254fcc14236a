// What cuda.cu offers cuda.cpp, in plain C++: their C++ libraries may be two.
#pragma once

#include "tables.h"

namespace cat {

// What did not succeed and CUDA's message; null where all did.
struct Failure {
  const char* what;
  const char* message;
};

// Of a call with at least one block and a result that is not int16.
Failure launch(const FbankView& tables, const FbankCall& call, unsigned blocks, int device, void* stream);

// 13000 is CUDA 13.0: of this build, and of the driver (0 where there is none).
int cuda_version();
int driver_version();

// Whether the device can run a kernel of this build.
Failure try_kernel(int device);

}  // namespace cat
