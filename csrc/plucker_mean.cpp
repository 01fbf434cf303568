#include "plucker_mean.h"

#include <array>

#include "elements.h"
#include "kernel.h"

namespace simplex {

namespace {

// Only the CPU looks at the values: on CUDA that would wait for the GPU.
const Tensor& checked_starts(const char* op, const Tensor& cu_seqlens, const Tensor& z) {
  SIMPLEX_EXPECT(cu_seqlens.dim() == 1, op, "cu_seqlens to be 1-dimensional [sequences + 1], got ", cu_seqlens.dim(),
                 " dimensions");
  const int64_t count = cu_seqlens.size(0), L = z.size(1);
  SIMPLEX_EXPECT(count >= 2, op, "cu_seqlens to hold at least 2 values, got ", count);
  expect_dtype(op, "cu_seqlens", cu_seqlens, ScalarType::Int);
  expect_device(op, "cu_seqlens", cu_seqlens, "z", z);
  SIMPLEX_EXPECT(z.size(0) == 1, op, "the batch of z to be 1 with cu_seqlens, got ", z.size(0));
  if (cu_seqlens.is_cpu()) {
    const Tensor values = packed(cu_seqlens);
    const int32_t* const at = elements<int32_t>(values);
    for (int64_t i = 0; i < count; ++i) {
      SIMPLEX_EXPECT(at[i] >= (i == 0 ? 0 : at[i - 1]), op, "cu_seqlens to ascend from 0, got ", at[i], " at ", i);
    }
    SIMPLEX_EXPECT(at[0] == 0, op, "cu_seqlens to ascend from 0, got ", at[0], " at 0");
    SIMPLEX_EXPECT(at[count - 1] == L, op, "cu_seqlens to end with the length of z (", L, "), got ", at[count - 1]);
  }
  return cu_seqlens;
}

}  // namespace

// The fake kernels (simplex_ops/plucker_mean.py) check the same in the same words.
PluckerMean checked_plucker_mean(const char* op, const Tensor& z, const std::vector<int64_t>& offsets,
                                 const std::optional<Tensor>& valid, const std::optional<Tensor>& cu_seqlens) {
  SIMPLEX_EXPECT(z.dim() == 3, op, "z to be 3-dimensional [batch, length, r], got ", z.dim(), " dimensions");
  expect_floating(op, "z", z);
  PluckerMean p{z, std::nullopt, std::nullopt, {}, z.size(0), z.size(1), z.size(2), z.scalar_type()};
  SIMPLEX_EXPECT(p.r >= 2 && p.r <= kMaxRank, op, "the last dim of z to be from 2 to 128, got ", p.r);
  SIMPLEX_EXPECT(!offsets.empty(), op, "offsets to hold at least one offset, got []");
  for (int64_t offset : offsets) {
    SIMPLEX_EXPECT(offset >= 1, op, "every offset to be at least 1, got ", offset);
    if (offset < p.L) p.offsets.push_back(offset);
  }
  if (valid) {
    expect_sizes(op, "valid", *valid, {p.B, p.L}, "batch and length of z");
    expect_dtype(op, "valid", *valid, ScalarType::Bool);
    expect_device(op, "valid", *valid, "z", z);
    p.valid = packed(*valid);
  }
  if (cu_seqlens) p.starts = packed(checked_starts(op, *cu_seqlens, z));
  p.z = packed(z);
  return p;
}

// ---- CUDA

namespace {

const KernelFamily kOffsets("plucker_mean_offsets", {});
const KernelFamily kForward("plucker_mean_fwd", {"dtype", "HEAD_DIM"});
const KernelFamily kBackwardToken("plucker_mean_bwd_token", {"dtype", "HEAD_DIM"});
const KernelFamily kBackwardGather("plucker_mean_bwd_gather", {"dtype", "HEAD_DIM"});

// One call's device, stream, key and the offsets in the device's memory.
class Launch {
 public:
  explicit Launch(const PluckerMean& p)
      : p_(p),
        device_(p.z.get_device_index()),
        stream_(current_cuda_stream(device_)),
        dtype_(dtype_constant(p.z)),
        offsets_(write_offsets()) {
    STD_TORCH_CHECK(p.tokens() < int64_t{1} << 30, "plucker_mean: ", p.tokens(), " tokens exceed a CUDA grid");
  }

  void operator()(const KernelFamily& family, std::initializer_list<Arg> pointers) const {
    const Kernel& kernel = family.find(device_, {dtype_, p_.r <= 32 ? 32 : kMaxRank});
    const int64_t block = kernel["BLOCK_T"];
    std::vector<Arg> args = {{"z_ptr", p_.z.const_data_ptr()},
                             {"valid_ptr", (p_.valid ? *p_.valid : p_.z).const_data_ptr()},
                             {"cu_seqlens_ptr", (p_.starts ? *p_.starts : p_.z).const_data_ptr()},
                             {"offsets_ptr", offsets_.const_data_ptr()}};
    args.insert(args.end(), pointers);
    args.insert(args.end(), {{"num_tokens", static_cast<int32_t>(p_.outputs())},
                             {"length", static_cast<int32_t>(p_.L)},
                             {"r", static_cast<int32_t>(p_.r)},
                             {"num_offsets", static_cast<int32_t>(p_.offsets.size())},
                             {"has_valid", static_cast<int32_t>(p_.valid.has_value())},
                             {"num_sequences", static_cast<int32_t>(p_.sequences())},
                             {"search_steps", search_steps()}});
    const auto blocks = static_cast<unsigned>((p_.outputs() + block - 1) / block);
    launch(kernel, device_, stream_, {blocks, 1, 1}, Span<Arg>(args.data(), args.size()));
  }

 private:
  // Of the bisection that finds a token's sequence.
  int32_t search_steps() const {
    int32_t steps = 0;
    while (int64_t{1} << steps < p_.sequences()) ++steps;
    return steps;
  }

  // As arguments of a kernel: a copy from the CPU could not be captured in a CUDA graph, and would wait for the GPU.
  Tensor write_offsets() const {
    constexpr size_t kAtOnce = 8;
    constexpr std::array<const char*, kAtOnce> names = {"o0", "o1", "o2", "o3", "o4", "o5", "o6", "o7"};
    const size_t count = (p_.offsets.size() + kAtOnce - 1) / kAtOnce * kAtOnce;
    const Tensor offsets = empty_like_device(p_.z, {static_cast<int64_t>(count)}, ScalarType::Int);
    for (size_t first = 0; first < count; first += kAtOnce) {
      std::vector<Arg> args = {{"offsets_ptr", offsets.const_data_ptr()}, {"first", static_cast<int32_t>(first)}};
      for (size_t i = 0; i < kAtOnce; ++i) {
        const bool given = first + i < p_.offsets.size();
        args.push_back({names[i], static_cast<int32_t>(given ? p_.offsets[first + i] : 0)});
      }
      launch(kOffsets.find(device_, {}), device_, stream_, {1, 1, 1}, Span<Arg>(args.data(), args.size()));
    }
    return offsets;
  }

  const PluckerMean& p_;
  int device_;
  void* stream_;
  int64_t dtype_;
  Tensor offsets_;
};

void forward_cuda(const PluckerMean& p, Tensor& pbar, Tensor& seen) {
  const Launch launch(p);
  launch(kForward, {{"pbar_ptr", pbar.const_data_ptr()},
                    {"seen_ptr", seen.const_data_ptr()},
                    {"history", static_cast<int32_t>(p.history)}});
}

void backward_cuda(const PluckerMean& p, const Tensor& grad_pbar, Tensor& grad_z) {
  const Launch launch(p);
  const Tensor own = empty_like_device(p.z, {p.B, p.L, p.r}, ScalarType::Float);
  const Tensor share = empty_like_device(p.z, {p.B, p.L, p.r}, ScalarType::Float);
  launch(kBackwardToken, {{"grad_pbar_ptr", grad_pbar.const_data_ptr()},
                          {"own_ptr", own.const_data_ptr()},
                          {"share_ptr", share.const_data_ptr()}});
  launch(kBackwardGather, {{"own_ptr", own.const_data_ptr()},
                           {"share_ptr", share.const_data_ptr()},
                           {"grad_z_ptr", grad_z.const_data_ptr()}});
}

}  // namespace

void plucker_mean_forward(const PluckerMean& p, Tensor& pbar, Tensor& seen) {
  if (p.outputs() > 0) (p.z.is_cpu() ? plucker_mean_forward_cpu : forward_cuda)(p, pbar, seen);
}

void plucker_mean_backward(const PluckerMean& p, const Tensor& grad_pbar, Tensor& grad_z) {
  if (p.tokens() > 0) (p.z.is_cpu() ? plucker_mean_backward_cpu : backward_cuda)(p, grad_pbar, grad_z);
}

// ---- The op

namespace {

Tensor plucker_mean(const Tensor& z, const std::vector<int64_t>& offsets, const std::optional<Tensor>& valid,
                    const std::optional<Tensor>& cu_seqlens) {
  const auto p = checked_plucker_mean("plucker_mean", z, offsets, valid, cu_seqlens);
  Tensor pbar = empty_like_device(z, {p.B, p.L, p.planes()}, p.dtype);
  Tensor seen = empty_like_device(z, {p.B, p.L}, p.dtype);
  plucker_mean_forward(p, pbar, seen);
  return pbar;
}

Tensor plucker_mean_backward_op(const Tensor& grad_pbar, const Tensor& z, const std::vector<int64_t>& offsets,
                                const std::optional<Tensor>& valid, const std::optional<Tensor>& cu_seqlens) {
  constexpr const char* op = "plucker_mean_backward";
  const auto p = checked_plucker_mean(op, z, offsets, valid, cu_seqlens);
  expect_sizes(op, "grad_pbar", grad_pbar, {p.B, p.L, p.planes()}, "batch and length of z, r * (r - 1) / 2");
  expect_like(op, "grad_pbar", grad_pbar, "z", z);
  Tensor grad_z = empty_like_device(z, {p.B, p.L, p.r}, p.dtype);
  plucker_mean_backward(p, packed(grad_pbar), grad_z);
  return grad_z;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(simplex, m) {
  m.def("plucker_mean(Tensor z, int[] offsets, Tensor? valid=None, Tensor? cu_seqlens=None) -> (Tensor pbar)");
  m.def(
      "plucker_mean_backward(Tensor grad_pbar, Tensor z, int[] offsets, Tensor? valid=None, Tensor? cu_seqlens=None) "
      "-> (Tensor grad_z)");
}

STABLE_TORCH_LIBRARY_IMPL(simplex, CPU, m) {
  m.impl("plucker_mean", TORCH_BOX(&plucker_mean));
  m.impl("plucker_mean_backward", TORCH_BOX(&plucker_mean_backward_op));
}

STABLE_TORCH_LIBRARY_IMPL(simplex, CUDA, m) {
  m.impl("plucker_mean", TORCH_BOX(&plucker_mean));
  m.impl("plucker_mean_backward", TORCH_BOX(&plucker_mean_backward_op));
}

}  // namespace simplex
