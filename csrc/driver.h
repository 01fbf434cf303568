// The CUDA driver API, reached by dlopen: the library links neither libcuda nor the CUDA runtime, so one file loads
// everywhere, beside a CPU-only torch too. cuda.h (types only) comes from Triton's wheel at build time.
#pragma once

#include <cuda.h>

#include <string>

namespace simplex {

// Every driver function that this project calls. cuLibrary* and cuTensorMap* exist since CUDA 12.0 (driver 525).
#define SIMPLEX_DRIVER_FUNCTIONS(F)    \
  F(cuInit)                            \
  F(cuDriverGetVersion)                \
  F(cuGetErrorName)                    \
  F(cuGetErrorString)                  \
  F(cuDeviceGetAttribute)              \
  F(cuDevicePrimaryCtxRetain)          \
  F(cuCtxGetDevice)                    \
  F(cuCtxGetCurrent)                   \
  F(cuCtxSetCurrent)                   \
  F(cuThreadExchangeStreamCaptureMode) \
  F(cuLibraryLoadData)                 \
  F(cuLibraryGetKernel)                \
  F(cuKernelGetFunction)               \
  F(cuKernelSetAttribute)              \
  F(cuTensorMapEncodeTiled)            \
  F(cuLaunchKernelEx)

struct Driver {
#define SIMPLEX_DECLARE(name) decltype(&::name) name;
  SIMPLEX_DRIVER_FUNCTIONS(SIMPLEX_DECLARE)
#undef SIMPLEX_DECLARE
  int version;  // what cuDriverGetVersion says, 13010 for CUDA 13.1
};

// The process's driver: loaded and initialised by the first call from any thread, later calls are one atomic read.
// Throws std::runtime_error if there is no usable driver; the next call then tries again.
const Driver& driver();

// Opens `library`, looks up every function and initialises it. Apart from driver() so that a test can name a library
// that is not there.
Driver load_driver(const char* library);

// Makes driver() return `fake`, or the real one again for nullptr. Tests only.
void replace_driver(const Driver* fake);

// Throws std::runtime_error: "<context>: <call> failed: CUDA_ERROR_X (what cuGetErrorString says)".
[[noreturn]] void throw_driver_error(const std::string& context, const char* call, CUresult result);

}  // namespace simplex
