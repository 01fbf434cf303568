// Grassmann mixing on Hopper without pbar in memory: triton_kernels/grassmann_mix.py.
#include <algorithm>

#include "grassmann_mix.h"
#include "kernel.h"

namespace simplex {

namespace {

const KernelFamily kStart("grassmann_mix_start", {"dtype"});
const KernelFamily kForward("grassmann_mix_fwd", {"dtype"});
const KernelFamily kBackwardFrame("grassmann_mix_bwd_frame", {"dtype"});
const KernelFamily kBackwardWeight("grassmann_mix_bwd_weight", {"dtype"});
const KernelFamily kFinish("grassmann_mix_finish", {"dtype"});

constexpr int64_t kWidth = 32;     // coordinates of the frames: r, padded
constexpr int64_t kColumns = 512;  // of the weight in the order of the tiles, 64 each
constexpr int64_t kPartRow = 128;  // elements of the sums that a warp adds up at a time
constexpr int64_t kTile = 64;      // tokens of a warpgroup, of which a program has two

int64_t blocks(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

TensorDescriptor matrix(const Tensor& t) { return {t.const_data_ptr(), {t.size(0), t.size(1)}, {t.size(1), 1}}; }

// One call's device, stream and frames.
class Launch {
 public:
  Launch(const PluckerMean& p, const Tensor& weight, const std::optional<Tensor>& bias, bool for_backward)
      : p_(p),
        d_(weight.size(0)),
        device_(p.z.get_device_index()),
        stream_(current_cuda_stream(device_)),
        columns_(empty_like_device(p.z, {d_, kColumns}, p.dtype)) {
    const Tensor w = packed(weight), b = packed(bias ? *bias : weight);
    frames_ = plucker_frames(p_, for_backward,
                             {&kStart.find(device_, {dtype_constant(p.z)}),
                              static_cast<unsigned>(d_),
                              {{"weight_ptr", w.const_data_ptr()},
                               {"bias_ptr", b.const_data_ptr()},
                               {"has_bias", static_cast<int32_t>(bias.has_value())},
                               {"columns_ptr", columns_.const_data_ptr()},
                               {"r", static_cast<int32_t>(p.r)}}});
  }

  static bool serves(const PluckerMean& p, int64_t d) {
    return !p.z.is_cpu() && blocks(p.r, 8) * 8 == kWidth && d % 8 == 0 && p.outputs() * d > 0 &&
           kForward.find_if(p.z.get_device_index(), {dtype_constant(p.z)});
  }

  // A gradient of g of more columns does not fit the registers.
  static bool serves_backward(const PluckerMean& p, int64_t d) {
    return serves(p, d) && d <= kBackwardFrame.find(p.z.get_device_index(), {dtype_constant(p.z)})["BLOCK_N"];
  }

  void forward(const Tensor& g, bool bias_everywhere) const {
    run(kForward,
        [&](const Kernel& kernel) { return Grid{blocks(p_.outputs(), 2 * kTile), blocks(d_, kernel["BLOCK_N"])}; },
        {{"frame_desc", matrix(*frames_.frame)},
         {"weight_desc", matrix(columns_)},
         {"g_desc", matrix(g)},
         {"bias_everywhere", static_cast<int32_t>(bias_everywhere)}});
  }

  // With respect to weight and bias; that to z is written to grad_z.
  std::pair<Tensor, Tensor> backward(const Tensor& grad_g, bool bias_everywhere, const Tensor& grad_z) const {
    // As many parts of the sum over tokens as fill the GPU, of whole tiles of tokens.
    const int64_t groups = kColumns / (2 * kTile), tiles = blocks(p_.tokens(), kTile);
    const int64_t share = blocks(tiles, kProcessors / groups), num_parts = blocks(tiles, share);
    // Neither may take the other's memory: the two kernels run side by side.
    const Tensor part = empty_like_device(p_.z, {num_parts, kColumns, d_}, ScalarType::Float);
    const Tensor turn = empty_columns(p_, 2 * kWidth);
    run(kBackwardWeight, [&](const Kernel&) { return Grid{groups, num_parts}; },
        {{"frame_desc", matrix(*frames_.frame)},
         {"grad_g_desc", matrix(grad_g)},
         {"part_ptr", part.const_data_ptr()},
         {"num_tokens", static_cast<int32_t>(p_.tokens())},
         {"share", static_cast<int32_t>(share * kTile)},
         {"d", static_cast<int32_t>(d_)},
         {"bias_everywhere", static_cast<int32_t>(bias_everywhere)}});
    const Tensor grad_weight = empty_like_device(p_.z, {d_, p_.planes()}, p_.dtype);
    const Tensor grad_bias = empty_like_device(p_.z, {d_}, p_.dtype);
    run(kBackwardFrame, [&](const Kernel&) { return Grid{blocks(p_.tokens(), 2 * kTile), 1}; },
        {{"frame_desc", matrix(*frames_.frame)},
         {"weight_desc", matrix(columns_)},
         {"grad_g_desc", matrix(grad_g)},
         {"turn_desc", matrix(turn)},
         {"part_desc", {part.const_data_ptr(), {part.numel() / kPartRow, kPartRow}, {kPartRow, 1}}},
         {"grad_weight_ptr", grad_weight.const_data_ptr()},
         {"grad_bias_ptr", grad_bias.const_data_ptr()},
         {"num_parts", static_cast<int32_t>(num_parts)},
         {"d", static_cast<int32_t>(d_)},
         {"r", static_cast<int32_t>(p_.r)}});
    plucker_mean_backward_token(p_, frames_, turn, grad_z, {&kFinish.find(device_, {dtype_constant(p_.z)})});
    return {grad_weight, grad_bias};
  }

 private:
  static constexpr int64_t kProcessors = 132;  // of an H100 or H200
  using Grid = std::array<int64_t, 2>;

  template <class GridOf>
  void run(const KernelFamily& family, const GridOf& grid_of, std::initializer_list<Arg> args) const {
    const Kernel& kernel = family.find(device_, {dtype_constant(p_.z)});
    const Grid grid = grid_of(kernel);
    launch(kernel, device_, stream_, {static_cast<unsigned>(grid[0]), static_cast<unsigned>(grid[1]), 1}, args);
  }

  const PluckerMean& p_;
  int64_t d_;
  int device_;
  void* stream_;
  Tensor columns_;  // the weight in the order of the tiles, and the bias
  PluckerFrames frames_;
};

}  // namespace

std::optional<Tensor> mixed_in_registers(const PluckerMean& p, const Tensor& weight, const std::optional<Tensor>& bias,
                                         bool bias_everywhere) {
  const int64_t d = weight.size(0);
  if (!Launch::serves(p, d)) return std::nullopt;
  const Launch launch(p, weight, bias, false);
  const Tensor g = empty_like_device(p.z, {p.outputs(), d}, p.dtype);
  launch.forward(g, bias_everywhere);
  return g;
}

std::optional<std::pair<Tensor, Tensor>> gradients_in_registers(const PluckerMean& p, const Tensor& grad_g,
                                                                const Tensor& weight, bool bias_everywhere,
                                                                const Tensor& grad_z) {
  const int64_t d = weight.size(0);
  if (!Launch::serves_backward(p, d)) return std::nullopt;
  return Launch(p, weight, std::nullopt, true).backward(grad_g, bias_everywhere, grad_z);
}

}  // namespace simplex
