#include "plucker_mean.h"

#include <algorithm>
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
const KernelFamily kFrame("plucker_mean_frame", {"dtype", "HEAD_DIM"});
const KernelFamily kForward("plucker_mean_fwd", {"dtype"});
const KernelFamily kBackwardFrame("plucker_mean_bwd_frame", {"dtype"});
const KernelFamily kBackwardToken("plucker_mean_bwd_token", {"dtype", "HEAD_DIM"});

// So many offsets are arguments of the kernels.
constexpr size_t kFewOffsets = 8;

int64_t padded(int64_t size) { return (size + 7) / 8 * 8; }

// HEAD_DIM of the token kernels.
int64_t rows_of(const PluckerMean& p) { return p.r <= 32 ? 32 : p.r <= 64 ? 64 : kMaxRank; }

int32_t as_i32(int64_t value) { return static_cast<int32_t>(value); }

// One call's device, stream and key.
class Launch {
 public:
  explicit Launch(const PluckerMean& p)
      : p_(p),
        device_(p.z.get_device_index()),
        stream_(current_cuda_stream(device_)),
        dtype_(dtype_constant(p.z)),
        stride_(as_i32(padded(p.outputs()))) {
    SIMPLEX_EXPECT(p.tokens() < int64_t{1} << 29, "plucker_mean", "batch * length of z to be below 2^29 on cuda, got ",
                   p.tokens());
  }

  // A kernel that pairs tokens, or the one in its place that has more programs.
  void pairs(const KernelFamily& family, const PluckerFrames& frames, std::initializer_list<Arg> own,
             const MorePrograms& more) const {
    const Kernel& kernel = more.kernel ? *more.kernel : family.find(device_, {dtype_, rows_of(p_)});
    int32_t o[kFewOffsets] = {};
    if (!frames.offsets) std::copy(p_.offsets.begin(), p_.offsets.end(), o);
    std::vector<Arg> args = {{"valid_ptr", (p_.valid ? *p_.valid : p_.z).const_data_ptr()},
                             {"cu_seqlens_ptr", (p_.starts ? *p_.starts : p_.z).const_data_ptr()},
                             {"offsets_ptr", (frames.offsets ? *frames.offsets : p_.z).const_data_ptr()}};
    for (size_t i = 0; i < kFewOffsets; ++i) args.push_back({kOffsetNames[i], o[i]});
    args.push_back({"frame_ptr", frames.frame->const_data_ptr()});
    args.push_back({"pairs_ptr", (frames.pairs ? *frames.pairs : *frames.frame).const_data_ptr()});
    args.insert(args.end(), own);
    args.insert(args.end(), {{"num_tokens", as_i32(p_.outputs())},
                             {"length", as_i32(p_.L)},
                             {"width", as_i32(padded(p_.r))},
                             {"num_offsets", as_i32(p_.offsets.size())},
                             {"has_valid", as_i32(p_.valid.has_value())},
                             {"num_sequences", as_i32(p_.sequences())},
                             {"search_steps", search_steps()}});
    args.insert(args.end(), more.args.begin(), more.args.end());
    const unsigned programs =
        blocks(p_.outputs(), kBlockColumns) * static_cast<unsigned>(kBlockColumns / kernel["BLOCK_T"]);
    const std::array<unsigned, 3> grid = {programs + more.count, 1, 1};
    launch(kernel, device_, stream_, grid, Span<Arg>(args.data(), args.size()));
  }

  void forward(const PluckerFrames& frames, const Tensor& pbar) const {
    const Kernel& kernel = kForward.find(device_, {dtype_});
    const unsigned tokens = blocks(stride_, kernel["BLOCK_T"]);
    // A few tokens, as in decoding, would be a few programs that wait for their loads.
    const unsigned shares = std::clamp(kEnoughPrograms / tokens, 2u, 16u);
    planes(kernel, {tokens, blocks(p_.r, kernel["BLOCK_R"]), shares}, frames, {{"pbar_ptr", pbar.const_data_ptr()}});
  }

  void backward(const PluckerFrames& frames, const Tensor& grad_pbar, const Tensor& turn) const {
    const Kernel& kernel = kBackwardFrame.find(device_, {dtype_});
    planes(kernel, {blocks(stride_, kernel["BLOCK_T"]), blocks(rows_of(p_), kernel["BLOCK_R"]), 1}, frames,
           {{"grad_pbar_ptr", grad_pbar.const_data_ptr()}, {"turn_ptr", turn.const_data_ptr()}});
  }

  // As arguments of a kernel: a copy from the CPU could not be captured in a CUDA graph, and would wait for the GPU.
  Tensor many_offsets() const {
    const size_t count = (p_.offsets.size() + kFewOffsets - 1) / kFewOffsets * kFewOffsets;
    const Tensor offsets = empty_like_device(p_.z, {static_cast<int64_t>(count)}, ScalarType::Int);
    for (size_t first = 0; first < count; first += kFewOffsets) {
      std::vector<Arg> args = {{"offsets_ptr", offsets.const_data_ptr()}, {"first", as_i32(first)}};
      for (size_t i = 0; i < kFewOffsets; ++i) {
        const bool given = first + i < p_.offsets.size();
        args.push_back({kOffsetNames[i], as_i32(given ? p_.offsets[first + i] : 0)});
      }
      launch(kOffsets.find(device_, {}), device_, stream_, {1, 1, 1}, Span<Arg>(args.data(), args.size()));
    }
    return offsets;
  }

 private:
  static constexpr unsigned kEnoughPrograms = 512;
  static constexpr const char* kOffsetNames[kFewOffsets] = {"o0", "o1", "o2", "o3", "o4", "o5", "o6", "o7"};

  static unsigned blocks(int64_t whole, int64_t part) { return static_cast<unsigned>((whole + part - 1) / part); }

  void planes(const Kernel& kernel, const std::array<unsigned, 3>& grid, const PluckerFrames& frames,
              std::initializer_list<Arg> own) const {
    std::vector<Arg> args = {{"frame_ptr", frames.frame->const_data_ptr()}};
    args.insert(args.end(), own);
    args.insert(args.end(), {{"r", as_i32(p_.r)}, {"rows", as_i32(rows_of(p_))}, {"stride", stride_}});
    launch(kernel, device_, stream_, grid, Span<Arg>(args.data(), args.size()));
  }

  // Of the bisection that finds a token's sequence.
  int32_t search_steps() const {
    int32_t steps = 0;
    while (int64_t{1} << steps < p_.sequences()) ++steps;
    return steps;
  }

  const PluckerMean& p_;
  int device_;
  void* stream_;
  int64_t dtype_;
  int32_t stride_;
};

// z with rows of whole 16 bytes.
Tensor padded_rows(const PluckerMean& p) {
  const int64_t width = padded(p.r);
  if (width == p.r) return p.z;
  Tensor wide = torch::stable::new_zeros(p.z, {p.B, p.L, width});
  Tensor rows = torch::stable::narrow(wide, 2, 0, p.r);
  torch::stable::copy_(rows, p.z);
  return wide;
}

void backward_cuda(const PluckerMean& p, const PluckerFrames& frames, const Tensor& grad_pbar, const Tensor& grad_z) {
  const Launch launch(p);
  const Tensor turn = empty_columns(p, 2 * rows_of(p));
  launch.backward(frames, grad_pbar, turn);
  plucker_mean_backward_token(p, frames, turn, grad_z);
}

}  // namespace

void plucker_mean_backward_token(const PluckerMean& p, const PluckerFrames& frames, const Tensor& turn,
                                 const Tensor& grad_z, const MorePrograms& more) {
  const Launch launch(p);
  const int64_t width = padded(p.r);
  // The kernel writes 16 bytes at a time.
  const bool direct =
      width == p.r && grad_z.stride(0) % 8 == 0 && reinterpret_cast<uintptr_t>(grad_z.const_data_ptr()) % 16 == 0;
  const Tensor rows = direct ? grad_z : empty_like_device(p.z, {p.tokens(), width}, p.dtype);
  launch.pairs(kBackwardToken, frames,
               {{"turn_ptr", turn.const_data_ptr()},
                {"grad_z_ptr", rows.const_data_ptr()},
                {"grad_stride", as_i32(rows.stride(0))}},
               more);
  Tensor to = grad_z;
  if (!direct) torch::stable::copy_(to, reinterpreted(rows, {p.tokens(), p.r}, {width, 1}));
}

Tensor empty_columns(const PluckerMean& p, int64_t num_rows) {
  const int64_t blocks = (p.outputs() + kBlockColumns - 1) / kBlockColumns;
  return empty_like_device(p.z, {blocks * num_rows, kBlockColumns}, ScalarType::Float);
}

PluckerFrames plucker_frames(const PluckerMean& p, bool for_backward, const MorePrograms& more) {
  if (p.z.is_cpu() || p.outputs() == 0) return {p.z, {}, {}, {}, {}};
  const Launch launch(p);
  PluckerFrames frames{padded_rows(p), {}, {}, {}, {}};
  if (p.offsets.size() > kFewOffsets) frames.offsets = launch.many_offsets();
  frames.frame = empty_columns(p, 2 * rows_of(p) + 2);
  if (for_backward) frames.pairs = empty_columns(p, 3 * static_cast<int64_t>(p.offsets.size()));
  frames.seen = empty_like_device(p.z, {p.outputs(), 1}, p.dtype);
  launch.pairs(kFrame, frames,
               {{"keeps_pairs", as_i32(for_backward)},
                {"z_ptr", frames.z.const_data_ptr()},
                {"seen_ptr", frames.seen->const_data_ptr()},
                {"history", as_i32(p.history)}},
               more);
  return frames;
}

Tensor empty_planes(const PluckerMean& p) {
  if (p.z.is_cpu()) return empty_like_device(p.z, {p.outputs(), p.planes()}, p.dtype);
  const Tensor by_planes = empty_like_device(p.z, {p.planes(), padded(p.outputs())}, p.dtype);
  return reinterpreted(by_planes, {p.outputs(), p.planes()}, {1, by_planes.stride(0)});
}

MeanPlucker plucker_mean_forward(const PluckerMean& p, const PluckerFrames& frames) {
  MeanPlucker mean{empty_planes(p), frames.seen ? *frames.seen : empty_like_device(p.z, {p.outputs(), 1}, p.dtype)};
  if (p.outputs() == 0) return mean;
  if (p.z.is_cpu()) {
    plucker_mean_forward_cpu(p, mean.pbar, mean.seen);
  } else {
    Launch(p).forward(frames, mean.pbar);
  }
  return mean;
}

void plucker_mean_backward(const PluckerMean& p, const PluckerFrames& frames, const Tensor& grad_pbar,
                           const Tensor& grad_z) {
  if (p.tokens() == 0) return;
  if (p.z.is_cpu()) {
    plucker_mean_backward_cpu(p, grad_pbar, grad_z);
  } else {
    backward_cuda(p, frames, grad_pbar, grad_z);
  }
}

// ---- The op

namespace {

Tensor plucker_mean(const Tensor& z, const std::vector<int64_t>& offsets, const std::optional<Tensor>& valid,
                    const std::optional<Tensor>& cu_seqlens) {
  const auto p = checked_plucker_mean("plucker_mean", z, offsets, valid, cu_seqlens);
  const Tensor by_planes = plucker_mean_forward(p, plucker_frames(p, false)).pbar;
  return torch::stable::view(packed(by_planes), {p.B, p.L, p.planes()});
}

Tensor plucker_mean_backward_op(const Tensor& grad_pbar, const Tensor& z, const std::vector<int64_t>& offsets,
                                const std::optional<Tensor>& valid, const std::optional<Tensor>& cu_seqlens) {
  constexpr const char* op = "plucker_mean_backward";
  const auto p = checked_plucker_mean(op, z, offsets, valid, cu_seqlens);
  expect_sizes(op, "grad_pbar", grad_pbar, {p.B, p.L, p.planes()}, "batch and length of z, r * (r - 1) / 2");
  expect_like(op, "grad_pbar", grad_pbar, "z", z);
  const Tensor grad_z = empty_like_device(z, {p.B, p.L, p.r}, p.dtype);
  Tensor by_planes = torch::stable::view(packed(grad_pbar), {p.tokens(), p.planes()});
  if (!z.is_cpu()) {
    const Tensor by_tokens = by_planes;
    by_planes = empty_planes(p);
    torch::stable::copy_(by_planes, by_tokens);
  }
  plucker_mean_backward(p, plucker_frames(p, true), by_planes, reinterpreted(grad_z, {p.tokens(), p.r}, {p.r, 1}));
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
