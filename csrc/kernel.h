// The kernel table, the choice of a row and the ONE launcher. No torch, no CUDA runtime: see driver.h.
//
// The table is generated (triton_kernels/build.py -> build/kernels/kernels.cpp). What the generated file must contain:
//   * #include "kernel.h", everything in namespace simplex, tables `static const` and constant-initialised;
//   * per cubin an `asm(".incbin ...")` into .rodata, 64-byte aligned, with a hidden extern declaration and its size as
//   a literal;
//   * `static const Kernel kTable[]`, one positional initialiser per row, fields in the order of struct Kernel;
//   * `Span<Kernel> kernel_table() { return kTable; }`.
// Rows of a family carry the same key names in the same order. Rows that share a key and an arch differ in their tile:
// the launcher takes the first in table order that fits the device's shared memory, so the table lists the fastest
// first.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <mutex>

namespace simplex {

// A device index is a bit of Kernel::Loaded::devices.
constexpr int kMaxDevices = 64;
constexpr int kMaxKeys = 8;
constexpr int kMaxParams =
    96;  // as the kernel sees them: a tensor map of rank r counts 1 + 2r, plus the 2 scratch pointers
constexpr int kMaxTensorMaps = 8;
constexpr int kMaxTensorMapRank = 5;

// The value of a constant named "dtype".
enum class DType : int64_t { fp32, fp16, bf16 };

template <class T>
struct Span {
  const T* data = nullptr;
  size_t size = 0;

  constexpr Span() = default;
  constexpr Span(const T* data, size_t size) : data(data), size(size) {}
  template <size_t N>
  constexpr Span(const T (&array)[N]) : data(array), size(N) {}

  constexpr const T* begin() const { return data; }
  constexpr const T* end() const { return data + size; }
  constexpr const T& operator[](size_t i) const { return data[i]; }
};

// A compile-time constant of a kernel. dtype -> DType, bool -> 0 or 1.
struct Constant {
  const char* name;
  int64_t value;
};

enum class ParamType : uint8_t { Pointer, I32, I64, F32, TensorMap };

// A run-time parameter, without the hidden ones. `divisibility` is what the cubin was compiled to rely on: a power of
// two, in bytes for a pointer and in units for an integer; 1 promises nothing.
struct Param {
  const char* name;
  ParamType type;
  int32_t divisibility;
};

// One entry of `tensordesc_meta` in Triton's metadata, as it stands there (elem_type is the device's enumeration, the
// launcher translates it). block_size is the box that one copy moves, slowest dimension first; its length is the rank.
struct TensorMapMeta {
  int32_t swizzle;
  int32_t elem_size;
  int32_t elem_type;
  bool fp4_padded;
  Span<int32_t> block_size;
};

// One row of the table: one cubin. Not copyable, always passed by reference.
struct Kernel {
  const char* name;    // "two_simplicial_fwd-dtype=bf16-HEAD_DIM=128-sm90"
  const char* family;  // "two_simplicial_fwd"
  const char* symbol;  // entry point in the cubin
  int arch;            // 90 for sm_90
  char arch_suffix;    // '\0', 'a' or 'f'
  int num_warps;       // of a CTA, from the metadata: warp specialisation adds to what the source asked for
  int num_ctas;        // of a cluster
  int shared;          // dynamic shared memory, bytes
  bool cooperative;    // launch_cooperative_grid
  bool pdl;            // launch_pdl: programmatic dependent launch
  Span<Constant> key;
  Span<Constant> tile;
  Span<Param> params;
  Span<TensorMapMeta> tensor_maps;  // one per TensorMap parameter, in the order of the parameters
  const unsigned char* cubin;
  size_t cubin_size;

  // The launcher's own state, left out of the generated initialiser. Mutable, because the table is const to everybody
  // else.
  struct Loaded {
    std::atomic<void*> handle{nullptr};     // CUkernel: one per process, the driver maps it to each context
    std::atomic<uint64_t> devices{0};       // bit d: `handle` is ready to launch on device d
    std::atomic<bool> params_match{false};  // a launch has passed the comparison of names
  };
  mutable Loaded loaded{};

  // The key or tile constant of that name; throws if there is none.
  int64_t operator[](const char* name) const;
};

// Defined by the generated file.
Span<Kernel> kernel_table();

// For benchmarks/tune.py, which reaches it through ctypes: until the next call, every find() of this family and key, on
// any device, returns `kernel`, a row of another table (that must stay), instead of ours; nullptr: ours again. Returns
// whether the kernel that was on trial so far has ever been launched.
extern "C" __attribute__((visibility("default"))) bool simplex_try_kernel(const Kernel* kernel);

// The rows of one family, indexed by their key. Cheap to construct (also as a global): the table is read on first use.
class KernelFamily {
 public:
  KernelFamily(const char* family, std::initializer_list<const char*> key_names);
  KernelFamily(const KernelFamily&) = delete;
  KernelFamily& operator=(const KernelFamily&) = delete;

  // The row for these key values (in the order of key_names) that suits the device best: newest arch first, then table
  // order, among those that fit its shared memory. Throws std::runtime_error naming what was asked for and what the
  // wheel has. Thread-safe; after the first call for a device it neither locks nor allocates.
  const Kernel& find(int device, std::initializer_list<int64_t> key) const;
  // The same, but null where nothing fits: for a variant that only some keys or archs have.
  const Kernel* find_if(int device, std::initializer_list<int64_t> key) const;

 private:
  struct Candidate;
  const Span<Candidate>& candidates(int device) const;
  void check_key_names(const Kernel& kernel) const;
  [[noreturn]] void throw_not_found(int device, const int64_t* key) const;

  const char* family_;
  size_t num_keys_;
  std::array<const char*, kMaxKeys> key_names_;
  mutable std::mutex mutex_;
  // The rows that run on a device, best first. Never freed: a thread may still launch while static objects are
  // destroyed.
  mutable std::array<std::atomic<const Span<Candidate>*>, kMaxDevices> candidates_{};
};

// What a TMA descriptor argument is made of. Sizes and strides in elements, slowest dimension first, last stride 1. A
// copy moves `box`; where that is 0, what the variant was compiled for.
struct TensorDescriptor {
  const void* data;
  int rank;
  int64_t shape[kMaxTensorMapRank];
  int64_t strides[kMaxTensorMapRank];
  std::array<int32_t, kMaxTensorMapRank> box{};

  TensorDescriptor(const void* data, std::initializer_list<int64_t> shape, std::initializer_list<int64_t> strides);
};

// A named argument. The types are exact, {"scale", 0.5} (a double) does not compile: a kernel's float is 32 bits wide.
struct Arg {
  const char* name;
  ParamType type;
  union {
    const void* pointer;
    int32_t i32;
    int64_t i64;
    float f32;
    TensorDescriptor descriptor;
  };

  Arg(const char* name, const void* value) : name(name), type(ParamType::Pointer), pointer(value) {}
  Arg(const char* name, int32_t value) : name(name), type(ParamType::I32), i32(value) {}
  Arg(const char* name, int64_t value) : name(name), type(ParamType::I64), i64(value) {}
  Arg(const char* name, float value) : name(name), type(ParamType::F32), f32(value) {}
  Arg(const char* name, const TensorDescriptor& value) : name(name), type(ParamType::TensorMap), descriptor(value) {}
  Arg(const char* name, bool value) = delete;  // would silently become an I32
};

// Launches `kernel` on `stream` (a CUstream, NULL allowed) of `device`, with `grid` clusters and the parameters in the
// kernel's order. Throws std::runtime_error, before anything runs, if the arguments are not the kernel's parameters by
// count, type or (at the kernel's first launch) name, if a pointer or integer breaks a divisibility that the cubin
// relies on, or if grid y or z is past 65535; a grid with a zero launches nothing. The first launch on a device loads
// the cubin; it may be inside a graph capture. Later launches neither lock nor allocate.
void launch(const Kernel& kernel, int device, void* stream, std::array<unsigned, 3> grid, Span<Arg> args);

// The same, written in place: launch(kernel, device, stream, {blocks, heads, batch}, {{"q_ptr", q}, {"n_q", n_q}}).
inline void launch(const Kernel& kernel, int device, void* stream, std::array<unsigned, 3> grid,
                   std::initializer_list<Arg> args) {
  launch(kernel, device, stream, grid, Span<Arg>(args.begin(), args.size()));
}

}  // namespace simplex
