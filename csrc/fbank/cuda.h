// Log-mel frames on a GPU: one kernel for the whole batch.
#pragma once

#include <string>

#include "tables.h"

namespace cat {

// Launches on `stream` (a cudaStream_t) of `device` and returns; nothing waits, nothing is allocated. `device_tables`:
// a copy of `tables.memory` on the device. Throws std::invalid_argument for what the kernels do not compute,
// std::runtime_error with CUDA's message where the launch fails.
void fbank_cuda(const FbankTables& tables, const void* device_tables, const FbankCall& call, int device, void* stream);

// Why the kernels cannot run on this device, in words; empty where they can.
std::string cuda_problem(int device);

}  // namespace cat
