#include <algorithm>
#include <climits>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>

#include "driver.h"
#include "kernel.h"

namespace simplex {

TensorDescriptor::TensorDescriptor(const void* data, std::initializer_list<int64_t> shape,
                                   std::initializer_list<int64_t> strides)
    : data(data), rank(static_cast<int>(shape.size())) {
  if (shape.size() != strides.size() || shape.size() < 1 || shape.size() > kMaxTensorMapRank) {
    throw std::runtime_error("TensorDescriptor: expected 1 to " + std::to_string(kMaxTensorMapRank) +
                             " sizes and as many strides, got " + std::to_string(shape.size()) + " and " +
                             std::to_string(strides.size()));
  }
  std::copy(shape.begin(), shape.end(), this->shape);
  std::copy(strides.begin(), strides.end(), this->strides);
}

namespace {

[[noreturn]] void throw_argument(const Kernel& kernel, const char* argument, const std::string& problem) {
  throw std::runtime_error(std::string(kernel.name) + ": expected " + argument + " to be " + problem);
}

bool same(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }

const char* type_string(ParamType type) {
  static const char* const kNames[] = {"a pointer", "an int32", "an int64", "a float32", "a tensor descriptor"};
  return kNames[static_cast<int>(type)];
}

std::string hex_string(const void* pointer) {
  char text[32];
  std::snprintf(text, sizeof(text), "%p", pointer);
  return text;
}

void check_count(const Kernel& kernel, Span<Arg> args) {
  if (args.size == kernel.params.size) return;
  std::string names;
  for (const Param& param : kernel.params) names += std::string(names.empty() ? "" : ", ") + param.name;
  throw std::runtime_error(std::string(kernel.name) + ": expected " + std::to_string(kernel.params.size) +
                           " arguments (" + names + "), got " + std::to_string(args.size));
}

// Names cost a strcmp each and a call site does not change its own: compared once per kernel. The count and the types,
// which decide what memory the kernel reads, are compared at every launch.
void check_names(const Kernel& kernel, Span<Arg> args) {
  for (size_t i = 0; i < args.size; ++i) {
    const char* got = args[i].name;
    if (!same(got, kernel.params[i].name)) {
      throw_argument(kernel, kernel.params[i].name, "argument " + std::to_string(i) + ", got " + got);
    }
  }
  size_t seen_by_kernel = args.size + 2, maps = 0;
  for (const Param& param : kernel.params) {
    if (param.type != ParamType::TensorMap) continue;
    if (maps < kernel.tensor_maps.size) seen_by_kernel += 2 * kernel.tensor_maps[maps].block_size.size;
    ++maps;
  }
  if (maps != kernel.tensor_maps.size || maps > kMaxTensorMaps || seen_by_kernel > kMaxParams) {
    throw std::runtime_error(std::string(kernel.name) + ": the kernel table describes " +
                             std::to_string(kernel.tensor_maps.size) + " tensor maps for " + std::to_string(maps) +
                             " such parameters and " + std::to_string(seen_by_kernel) + " parameters in all");
  }
  kernel.loaded.params_match.store(true, std::memory_order_release);
}

// Triton's metadata counts element types as the PTX instruction does; the driver swapped three of them.
CUtensorMapDataType host_elem_type(int32_t device_elem_type) {
  switch (device_elem_type) {
    case 8:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT32_FTZ;
    case 9:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT64;
    case 10:
      return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    default:
      return static_cast<CUtensorMapDataType>(device_elem_type);
  }
}

void check_descriptor(const Kernel& kernel, const char* name, const TensorMapMeta& meta, const TensorDescriptor& d) {
  if (d.rank != static_cast<int>(meta.block_size.size)) {
    throw_argument(kernel, name,
                   "of rank " + std::to_string(meta.block_size.size) + ", got rank " + std::to_string(d.rank));
  }
  if (reinterpret_cast<uintptr_t>(d.data) % 16) {
    throw_argument(kernel, name, "aligned to 16 bytes, got " + hex_string(d.data));
  }
  for (int i = 0; i < d.rank; ++i) {
    if (d.shape[i] < 1 || d.shape[i] > INT_MAX) {
      throw_argument(
          kernel, name,
          "of sizes from 1 to 2^31 - 1, got " + std::to_string(d.shape[i]) + " in dimension " + std::to_string(i));
    }
    const bool last = i + 1 == d.rank;
    if (last ? d.strides[i] != 1 : (d.strides[i] < 0 || d.strides[i] * meta.elem_size % 16)) {
      throw_argument(kernel, name,
                     (last ? "contiguous, got stride " : "of strides of whole 16 bytes, got stride ") +
                         std::to_string(d.strides[i]) + " in dimension " + std::to_string(i));
    }
  }
}

void encode(const Driver& cu, const Kernel& kernel, const char* name, const TensorMapMeta& meta,
            const TensorDescriptor& d, CUtensorMap* map) {
  check_descriptor(kernel, name, meta, d);
  // The driver counts dimensions from the fastest, and strides in bytes from the second.
  cuuint64_t shape[kMaxTensorMapRank], strides[kMaxTensorMapRank];
  cuuint32_t box[kMaxTensorMapRank], steps[kMaxTensorMapRank];
  uint64_t last_byte = 0;
  for (int i = 0; i < d.rank; ++i) {
    const int from = d.rank - 1 - i;
    shape[i] = d.shape[from] * (i == 0 && meta.fp4_padded ? 2 : 1);
    box[i] = d.box[from] ? d.box[from] : meta.block_size[from];
    steps[i] = 1;
    const uint64_t stride = d.strides[from] * meta.elem_size;
    if (i > 0) strides[i - 1] = stride;
    last_byte += (shape[i] - 1) * stride;
  }
  const CUresult result = cu.cuTensorMapEncodeTiled(
      map, host_elem_type(meta.elem_type), d.rank, const_cast<void*>(d.data), shape, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, static_cast<CUtensorMapSwizzle>(meta.swizzle), CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw_driver_error(std::string(kernel.name) + ": argument " + name, "cuTensorMapEncodeTiled", result);
  }
  // Drivers up to 13.1 set a bit that is wrong for tensors under 128 KiB; Triton and CUTLASS clear it too.
  if (cu.version <= 13010 && last_byte + 1 < 128 * 1024) map->opaque[1] &= ~(uint64_t{1} << 21);
}

// The array of addresses that the driver copies the parameters from. Plain values are read where the caller's Arg holds
// them.
struct PackedParams {
  void* address[kMaxParams];
  int size = 0;
  CUtensorMap maps[kMaxTensorMaps];
  int32_t shapes[kMaxTensorMaps][kMaxTensorMapRank];
  int num_maps = 0;
  void* scratch = nullptr;  // global_scratch and profile_scratch: the build asserts that no kernel uses any

  void add(const void* value) { address[size++] = const_cast<void*>(value); }
};

// To the kernel a descriptor is the map by value, then its shape as int32 and its strides as int64.
void pack_descriptor(const Driver& cu, const Kernel& kernel, const Arg& arg, PackedParams& packed) {
  const int index = packed.num_maps++;
  const TensorDescriptor& d = arg.descriptor;
  encode(cu, kernel, arg.name, kernel.tensor_maps[index], d, &packed.maps[index]);
  packed.add(&packed.maps[index]);
  for (int i = 0; i < d.rank; ++i) {
    packed.shapes[index][i] = static_cast<int32_t>(d.shape[i]);
    packed.add(&packed.shapes[index][i]);
  }
  for (int i = 0; i < d.rank; ++i) packed.add(&d.strides[i]);
}

void pack(const Driver& cu, const Kernel& kernel, Span<Arg> args, PackedParams& packed) {
  for (size_t i = 0; i < args.size; ++i) {
    const Arg& arg = args[i];
    const Param& param = kernel.params[i];
    if (arg.type != param.type) {
      throw_argument(kernel, param.name, std::string(type_string(param.type)) + ", got " + type_string(arg.type));
    }
    const uint64_t remainder = static_cast<uint64_t>(param.divisibility) - 1;
    switch (arg.type) {
      case ParamType::Pointer:
        if (reinterpret_cast<uintptr_t>(arg.pointer) & remainder) {
          throw_argument(kernel, param.name,
                         "aligned to " + std::to_string(param.divisibility) + " bytes, got " + hex_string(arg.pointer));
        }
        packed.add(&arg.pointer);
        break;
      case ParamType::I32:
      case ParamType::I64: {
        const int64_t value = arg.type == ParamType::I32 ? arg.i32 : arg.i64;
        if (static_cast<uint64_t>(value) & remainder) {
          throw_argument(kernel, param.name,
                         "a multiple of " + std::to_string(param.divisibility) + ", got " + std::to_string(value));
        }
        packed.add(arg.type == ParamType::I32 ? static_cast<const void*>(&arg.i32) : &arg.i64);
        break;
      }
      case ParamType::F32:
        packed.add(&arg.f32);
        break;
      case ParamType::TensorMap:
        pack_descriptor(cu, kernel, arg, packed);
        break;
    }
  }
  packed.add(&packed.scratch);
  packed.add(&packed.scratch);
}

// Loading a cubin is not allowed while the calling thread captures a graph, unless it says that it knows what it does.
class RelaxedCapture {
 public:
  explicit RelaxedCapture(const Driver& cu) : cu_(cu) { cu_.cuThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxedCapture() { cu_.cuThreadExchangeStreamCaptureMode(&mode_); }

 private:
  const Driver& cu_;
  CUstreamCaptureMode mode_ = CU_STREAM_CAPTURE_MODE_RELAXED;  // then what the thread had before
};

// Makes a context of `device` current for a launch. Threads that never used CUDA (autograd's, a server's) have none:
// they keep the primary one, as after cudaSetDevice. A thread that is on another device gets that device back.
class CurrentContext {
 public:
  CurrentContext(const Driver& cu, const Kernel& kernel, int device) : cu_(cu) {
    CUresult result = cu.cuCtxGetCurrent(&previous_);
    if (result != CUDA_SUCCESS) throw_driver_error(kernel.name, "cuCtxGetCurrent", result);
    if (previous_) {     // null on a fresh thread, where cuCtxGetDevice is an error that tools report
      CUdevice current;  // a CUdevice is the device's index
      result = cu.cuCtxGetDevice(&current);
      if (result != CUDA_SUCCESS) throw_driver_error(kernel.name, "cuCtxGetDevice", result);
      if (current == device) {
        previous_ = nullptr;
        return;
      }
    }
    make_primary_current(kernel, device);
  }
  ~CurrentContext() {
    if (previous_) cu_.cuCtxSetCurrent(previous_);
  }

 private:
  void make_primary_current(const Kernel& kernel, int device) {
    static std::array<std::atomic<CUcontext>, kMaxDevices>
        primary{};  // each reference is kept: once per device is enough
    CUcontext context = primary[device].load(std::memory_order_acquire);
    if (!context) {
      const CUresult result = cu_.cuDevicePrimaryCtxRetain(&context, device);
      if (result != CUDA_SUCCESS) throw_driver_error(kernel.name, "cuDevicePrimaryCtxRetain", result);
      primary[device].store(context, std::memory_order_release);
    }
    const CUresult result = cu_.cuCtxSetCurrent(context);
    if (result != CUDA_SUCCESS) throw_driver_error(kernel.name, "cuCtxSetCurrent", result);
  }

  const Driver& cu_;
  CUcontext previous_ = nullptr;
};

bool ready(const Kernel& kernel, int device) {
  return kernel.loaded.devices.load(std::memory_order_acquire) >> device & 1;
}

// Loads the cubin (once per process) and readies it for `device`, whose context is current.
void load(const Driver& cu, const Kernel& kernel, int device) {
  static std::mutex mutex;  // one for all kernels: loading is rare
  std::lock_guard<std::mutex> lock(mutex);
  if (ready(kernel, device)) return;  // by the thread that held the lock before
  RelaxedCapture relaxed(cu);
  auto check = [&](CUresult result, const char* call) {
    if (result != CUDA_SUCCESS) throw_driver_error(kernel.name, call, result);
  };
  auto handle = static_cast<CUkernel>(kernel.loaded.handle.load(std::memory_order_relaxed));
  if (!handle) {
    CUlibrary library;
    check(cu.cuLibraryLoadData(&library, kernel.cubin, nullptr, nullptr, 0, nullptr, nullptr, 0), "cuLibraryLoadData");
    check(cu.cuLibraryGetKernel(&handle, library, kernel.symbol), "cuLibraryGetKernel");
    kernel.loaded.handle.store(handle, std::memory_order_relaxed);
  }
  if (kernel.shared > 48 * 1024) {
    check(cu.cuKernelSetAttribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, kernel.shared, handle, device),
          "cuKernelSetAttribute");
  }
  if (kernel.num_ctas > 8) {
    check(cu.cuKernelSetAttribute(CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1, handle, device),
          "cuKernelSetAttribute");
  }
  // Only asks for what the launch would do by itself, but here, where a capture allows it: loading is lazy otherwise.
  CUfunction function;
  check(cu.cuKernelGetFunction(&function, handle), "cuKernelGetFunction");
  kernel.loaded.devices.fetch_or(uint64_t{1} << device, std::memory_order_release);
}

constexpr int kMaxAttributes = 4;

unsigned attributes(const Kernel& kernel, CUlaunchAttribute* out) {
  unsigned count = 0;
  if (kernel.pdl) {
    out[count].id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    out[count++].value.programmaticStreamSerializationAllowed = 1;
  }
  if (kernel.cooperative) {
    out[count].id = CU_LAUNCH_ATTRIBUTE_COOPERATIVE;
    out[count++].value.cooperative = 1;
  }
  if (kernel.num_ctas > 1) {
    out[count].id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    out[count].value.clusterDim.x = kernel.num_ctas;
    out[count].value.clusterDim.y = 1;
    out[count++].value.clusterDim.z = 1;
    out[count].id = CU_LAUNCH_ATTRIBUTE_CLUSTER_SCHEDULING_POLICY_PREFERENCE;
    out[count++].value.clusterSchedulingPolicyPreference = CU_CLUSTER_SCHEDULING_POLICY_SPREAD;
  }
  return count;
}

std::string grid_string(const std::array<unsigned, 3>& grid) {
  return "[" + std::to_string(grid[0]) + ", " + std::to_string(grid[1]) + ", " + std::to_string(grid[2]) + "]";
}

[[noreturn]] void throw_launch_error(const Kernel& kernel, int device, const std::array<unsigned, 3>& grid,
                                     CUresult result) {
  throw_driver_error(std::string(kernel.name) + " on CUDA device " + std::to_string(device) + ", grid " +
                         grid_string(grid) + ", " + std::to_string(32 * kernel.num_warps) + " threads, " +
                         std::to_string(kernel.shared) + " bytes of shared memory",
                     "cuLaunchKernelEx", result);
}

}  // namespace

void launch(const Kernel& kernel, int device, void* stream, std::array<unsigned, 3> grid, Span<Arg> args) {
  check_count(kernel, args);
  if (!kernel.loaded.params_match.load(std::memory_order_acquire)) check_names(kernel, args);
  if (grid[0] == 0 || grid[1] == 0 || grid[2] == 0) return;
  if (grid[0] > INT_MAX / static_cast<unsigned>(kernel.num_ctas) || grid[1] > 65535 || grid[2] > 65535) {
    throw_argument(kernel, "the grid", "at most [2^31 - 1, 65535, 65535], got " + grid_string(grid));
  }
  if (device < 0 || device >= kMaxDevices) {
    throw_argument(kernel, "device",
                   "a CUDA device index below " + std::to_string(kMaxDevices) + ", got " + std::to_string(device));
  }

  const Driver& cu = driver();
  PackedParams packed;
  CurrentContext context(cu, kernel, device);  // before pack(): a tensor map is encoded in a context, too
  pack(cu, kernel, args, packed);
  if (!ready(kernel, device)) load(cu, kernel, device);

  CUlaunchAttribute attrs[kMaxAttributes];
  CUlaunchConfig config{};
  config.gridDimX = grid[0] * kernel.num_ctas;
  config.gridDimY = grid[1];
  config.gridDimZ = grid[2];
  config.blockDimX = 32 * kernel.num_warps;
  config.blockDimY = 1;
  config.blockDimZ = 1;
  config.sharedMemBytes = kernel.shared;
  config.hStream = static_cast<CUstream>(stream);
  config.attrs = attrs;
  config.numAttrs = attributes(kernel, attrs);
  // The driver takes a CUkernel here and finds its function in the context of the stream: right for green contexts too.
  auto function = static_cast<CUfunction>(kernel.loaded.handle.load(std::memory_order_relaxed));
  const CUresult result = cu.cuLaunchKernelEx(&config, function, packed.address, nullptr);
  if (result != CUDA_SUCCESS) throw_launch_error(kernel, device, grid, result);
}

}  // namespace simplex
