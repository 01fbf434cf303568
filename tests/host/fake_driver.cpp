#include "fake_driver.h"

#include <cuda.h>

#include <chrono>
#include <mutex>
#include <thread>

namespace {

std::mutex mutex;
thread_local uintptr_t current_context = 0;
thread_local int capture_mode = CU_STREAM_CAPTURE_MODE_GLOBAL;

int64_t number(const void* pointer) { return static_cast<int64_t>(reinterpret_cast<uintptr_t>(pointer)); }

template <class T>
std::vector<int64_t> numbers(const T* data, size_t size) {
  return std::vector<int64_t>(data, data + size);
}

CUresult record(const char* function, std::map<std::string, Value> values = {}) {
  std::lock_guard<std::mutex> lock(mutex);
  if (!fake().recording) return CUDA_SUCCESS;
  fake().calls.push_back({function, std::move(values)});
  const auto failure = fake().failures.find(function);
  return failure == fake().failures.end() ? CUDA_SUCCESS : static_cast<CUresult>(failure->second);
}

}  // namespace

FakeDriver& fake() {
  static FakeDriver driver;
  return driver;
}

void set_thread(uintptr_t context, int mode) {
  current_context = context;
  capture_mode = mode;
}

// The names and types of cuda.h, so that load_driver() finds them in this library as it would in libcuda.
extern "C" {

CUresult cuInit(unsigned) { return record("cuInit"); }

CUresult cuDriverGetVersion(int* version) {
  *version = fake().version;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult error, const char** text) {
  *text = error == CUDA_ERROR_INVALID_VALUE ? "CUDA_ERROR_INVALID_VALUE"
          : error == CUDA_ERROR_NO_DEVICE   ? "CUDA_ERROR_NO_DEVICE"
                                            : nullptr;
  return *text ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = error == CUDA_ERROR_INVALID_VALUE ? "invalid argument" : nullptr;
  return *text ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  const CUresult result = record("cuDeviceGetAttribute", {{"device", int64_t{device}}});
  if (device >= static_cast<int>(fake().devices.size())) return CUDA_ERROR_INVALID_DEVICE;
  const FakeDevice& d = fake().devices[device];
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
      *value = d.major;
      break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
      *value = d.minor;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
      *value = d.shared;
      break;
    default:
      return CUDA_ERROR_INVALID_VALUE;
  }
  return result;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  *context = reinterpret_cast<CUcontext>(uintptr_t{0x1000} + device);
  return record("cuDevicePrimaryCtxRetain", {{"device", int64_t{device}}});
}

CUresult cuCtxGetDevice(CUdevice* device) {
  if (!current_context) return CUDA_ERROR_INVALID_CONTEXT;
  *device = static_cast<int>(current_context - 0x1000);
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = reinterpret_cast<CUcontext>(current_context);
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) {
  current_context = reinterpret_cast<uintptr_t>(context);
  return record("cuCtxSetCurrent", {{"context", number(context)}});
}

CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
  const int before = capture_mode;
  capture_mode = *mode;
  *mode = static_cast<CUstreamCaptureMode>(before);
  return record("cuThreadExchangeStreamCaptureMode", {{"mode", int64_t{capture_mode}}});
}

CUresult cuLibraryLoadData(CUlibrary* library, const void* code, CUjit_option*, void**, unsigned, CUlibraryOption*,
                           void**, unsigned) {
  std::this_thread::sleep_for(std::chrono::milliseconds(2));  // long enough for another thread to get in between
  *library = static_cast<CUlibrary>(const_cast<void*>(code));
  return record("cuLibraryLoadData", {{"code", number(code)}, {"capture_mode", int64_t{capture_mode}}});
}

CUresult cuLibraryGetKernel(CUkernel* kernel, CUlibrary library, const char* name) {
  *kernel = reinterpret_cast<CUkernel>(library);
  return record("cuLibraryGetKernel", {{"name", std::string(name)}});
}

CUresult cuKernelGetFunction(CUfunction* function, CUkernel kernel) {
  *function = reinterpret_cast<CUfunction>(kernel);
  return record("cuKernelGetFunction",
                {{"context", static_cast<int64_t>(current_context)}, {"capture_mode", int64_t{capture_mode}}});
}

CUresult cuKernelSetAttribute(CUfunction_attribute attribute, int value, CUkernel kernel, CUdevice device) {
  return record("cuKernelSetAttribute", {{"attribute", int64_t{attribute}},
                                         {"value", int64_t{value}},
                                         {"kernel", number(kernel)},
                                         {"device", int64_t{device}}});
}

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* shape, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  for (auto& word : map->opaque) word = ~cuuint64_t{0};
  if (!fake().recording) return CUDA_SUCCESS;
  return record("cuTensorMapEncodeTiled", {{"type", int64_t{type}},
                                           {"address", number(address)},
                                           {"aligned", int64_t{number(map) % 64 == 0}},
                                           {"shape", numbers(shape, rank)},
                                           {"strides", numbers(strides, rank - 1)},
                                           {"box", numbers(box, rank)},
                                           {"steps", numbers(steps, rank)},
                                           {"interleave", int64_t{interleave}},
                                           {"swizzle", int64_t{swizzle}},
                                           {"promotion", int64_t{promotion}},
                                           {"fill", int64_t{fill}}});
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** params, void**) {
  if (!fake().recording) return CUDA_SUCCESS;
  std::vector<std::string> bytes;
  for (size_t i = 0; i < fake().param_sizes.size(); ++i) {
    bytes.emplace_back(static_cast<const char*>(params[i]), fake().param_sizes[i]);
  }
  std::map<std::string, Value> values{
      {"function", number(function)},
      {"grid", std::vector<int64_t>{config->gridDimX, config->gridDimY, config->gridDimZ}},
      {"block", std::vector<int64_t>{config->blockDimX, config->blockDimY, config->blockDimZ}},
      {"shared", int64_t{config->sharedMemBytes}},
      {"stream", number(config->hStream)},
      {"context", static_cast<int64_t>(current_context)},
      {"params", std::move(bytes)}};
  std::vector<int64_t> attributes;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const CUlaunchAttribute& a = config->attrs[i];
    attributes.push_back(a.id);
    if (a.id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) {
      const auto& c = a.value.clusterDim;
      values["cluster"] = std::vector<int64_t>{c.x, c.y, c.z};
    }
    if (a.id == CU_LAUNCH_ATTRIBUTE_COOPERATIVE) values["cooperative"] = int64_t{a.value.cooperative};
    if (a.id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION) {
      values["pdl"] = int64_t{a.value.programmaticStreamSerializationAllowed};
    }
  }
  values["attributes"] = std::move(attributes);
  return record("cuLaunchKernelEx", std::move(values));
}

}  // extern "C"
