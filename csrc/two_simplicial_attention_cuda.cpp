// 2-simplicial attention on CUDA: the launches. two_simplicial_attention_kernels.h says of what.
#include <algorithm>
#include <numeric>
#include <vector>

#include "two_simplicial_attention_kernels.h"

namespace simplex {

namespace {

// A tensor of [batch, length, heads, head_dim] to TMA.
TensorDescriptor four_dimensional(const Tensor& t) {
  auto leading = leading_strides(t);
  // A dimension of size 1 never adds to an address, but the driver wants a stride.
  for (size_t d = 0; d < leading.size(); ++d) leading[d] = t.size(d) == 1 ? 8 : leading[d];
  return {t.const_data_ptr(), {t.size(0), t.size(1), t.size(2), t.size(3)}, {leading[0], leading[1], leading[2], 1}};
}

// The arguments of a launch, in the order of the kernel's parameters.
class Args {
 public:
  Args(const Launch& launch, const Kernel& kernel) : l_(launch), maps_(kernel.tensor_maps.size) {
    list_.reserve(kMaxParams);
  }
  operator Span<Arg>() const { return {list_.data(), list_.size()}; }

  Args& pointer(const char* name, const Tensor& t) { return push({name, t.const_data_ptr()}); }
  Args& integer(const char* name, int64_t value) { return push({name, static_cast<int32_t>(value)}); }
  Args& number(const char* name, double value) { return push({name, static_cast<float>(value)}); }
  Args& descriptor(const char* name, const TensorDescriptor& d) { return push({name, d}); }
  Args& strides(const char* batch, const char* length, const char* head, const Tensor& t) {
    const auto leading = leading_strides(t);
    return push({batch, leading[0]}).push({length, leading[1]}).push({head, leading[2]});
  }

  // Kernels with 2 tensor maps load the long axis by TMA, those with 4 both, and take no strides of it.
  Args& input(size_t maps, const char* map, const char* ptr, const Tensor& t) {
    return maps_ >= maps ? descriptor(map, four_dimensional(t)) : pointer(ptr, t);
  }
  Args& inputs() {
    const Axes& x = l_.axes;
    pointer("q_ptr", l_.p.q).input(2, "k_long", "k_long_ptr", x.k_long).input(2, "v_long", "v_long_ptr", x.v_long);
    return input(4, "k_short", "k_short_ptr", x.k_short).input(4, "v_short", "v_short_ptr", x.v_short);
  }
  // Strides, those of grad_out too if there is one, sizes, windows and scale.
  Args& problem(const Tensor* grad_out = nullptr) {
    strides("stride_qb", "stride_qn", "stride_qh", l_.p.q);
    if (maps_ < 2) long_strides();
    if (maps_ < 4) short_strides();
    if (grad_out) strides("stride_gb", "stride_gn", "stride_gh", *grad_out);
    return sizes();
  }
  // Which pairs packed sequences forbid.
  Args& packing() {
    return pointer("bounds_ptr", l_.bounds ? *l_.bounds : l_.p.q).integer("packed", l_.bounds.has_value());
  }
  Args& long_strides() {
    strides("stride_klb", "stride_kln", "stride_klh", l_.axes.k_long);
    return strides("stride_vlb", "stride_vln", "stride_vlh", l_.axes.v_long);
  }
  Args& short_strides() {
    strides("stride_ksb", "stride_ksn", "stride_ksh", l_.axes.k_short);
    return strides("stride_vsb", "stride_vsn", "stride_vsh", l_.axes.v_short);
  }
  Args& sizes() {
    integer("num_queries", l_.p.Nq).integer("num_keys", l_.p.Nk).integer("kv_heads", l_.p.Hkv);
    integer("group", l_.p.group()).integer("head_dim", l_.p.D);
    return integer("w_long", l_.axes.w_long).integer("w_short", l_.axes.w_short).number("scale", l_.p.scale);
  }

 private:
  Args& push(const Arg& arg) {
    list_.push_back(arg);
    return *this;
  }

  const Launch& l_;
  const size_t maps_;
  std::vector<Arg> list_;
};

// Enough programs for every multiprocessor of the largest GPU to hold several.
constexpr int64_t kPrograms = 1024;
constexpr int64_t kL2Bytes = 32 << 20;  // what programs may count on of Hopper's L2 cache of 50 MB

// How many tiles a program of two_simplicial_bwd_dq walks. Few spread the work; but a program of t tokens owns t +
// w_short partial rows, so past kFreeBytes of them t is at least w_short / 8.
int64_t tiles_per_chunk(const Launch& l, int64_t num_tiles, int64_t block_m) {
  const int64_t heads = l.p.B * l.p.Hkv;
  const int64_t spread = std::max<int64_t>(num_tiles * heads / kPrograms, 1);
  const int64_t frugal = ceil_div(l.axes.w_short * l.p.group(), kMostRowsPerToken * block_m);
  const int64_t bytes = ceil_div(num_tiles, spread) * heads * l.axes.w_short * l.p.D * 2 * sizeof(float);
  return std::min(bytes > kFreeBytes ? std::max(spread, frugal) : spread, num_tiles);
}

// The gradients by what the kernels do with them.
struct GradAxes {
  const Tensor &k_long, &v_long, &k_short, &v_short;

  GradAxes(const Launch& l, const TwoSimplicialGrads& g)
      : GradAxes(&l.axes.k_long == &l.p.k1 ? GradAxes{g.k1, g.v1, g.k2, g.v2} : GradAxes{g.k2, g.v2, g.k1, g.v1}) {}

 private:
  GradAxes(const Tensor& kl, const Tensor& vl, const Tensor& ks, const Tensor& vs)
      : k_long(kl), v_long(vl), k_short(ks), v_short(vs) {}
};

// dk_long and dv_long: the splits' partial sums, added in order.
void add_splits(const Launch& l, const GradAxes& grad, const Tensor& part_k, const Tensor& part_v, int64_t splits,
                int64_t block_keys) {
  const Kernel& sum = kBackwardSum.find(l.device, {l.dtype, l.head_dim});
  Args args(l, sum);
  args.pointer("part_k_ptr", part_k).pointer("part_v_ptr", part_v);
  args.pointer("grad_k_ptr", grad.k_long).pointer("grad_v_ptr", grad.v_long);
  args.integer("num_keys", l.p.Nk).integer("kv_heads", l.p.Hkv).integer("head_dim", l.p.D);
  args.number("scale", l.p.scale).integer("num_splits", splits).integer("block_keys", block_keys);
  launch(sum, l.device, l.stream, l.grid(l.p.Nk), args);
}

// dk_short and dv_short: the partial rows of chunks of `chunk_rows` rows, of which a position has `group`.
void merge_chunks(const Launch& l, const GradAxes& grad, const Tensor& part_k, const Tensor& part_v,
                  int64_t num_positions, int64_t group, int64_t chunk_rows, int64_t chunk_span, int64_t reach) {
  const Kernel& merge = kBackwardMerge.find(l.device, {l.dtype, l.head_dim});
  launch(merge, l.device, l.stream, l.grid(ceil_div(l.p.Nk, merge["BLOCK_N"])),
         Args(l, merge)
             .pointer("part_k_ptr", part_k)
             .pointer("part_v_ptr", part_v)
             .pointer("grad_k_ptr", grad.k_short)
             .pointer("grad_v_ptr", grad.v_short)
             .integer("num_queries", num_positions)
             .integer("num_keys", l.p.Nk)
             .integer("kv_heads", l.p.Hkv)
             .integer("group", group)
             .integer("head_dim", l.p.D)
             .integer("w_short", l.axes.w_short)
             .number("scale", l.p.scale)
             .integer("chunk_rows", chunk_rows)
             .integer("chunk_span", chunk_span)
             .integer("reach", reach));
}

Tensor partial_sums(const Launch& l, int64_t programs, int64_t rows) {
  return empty_like_device(l.p.q, {programs, rows, l.p.D}, ScalarType::Float);
}

void backward_scaled(const Launch& l, const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& out,
                     const Tensor& lse, const Tensor& grad_q, const GradAxes& grad) {
  const TwoSimplicialAttention& p = l.p;
  const int64_t heads = p.B * p.Hkv;
  const Tensor statistics = empty_like_device(lse, {2 * heads, l.rows}, ScalarType::Float);
  const Kernel& dq = kBackwardQScaled.find(l.device, {l.dtype, l.head_dim, l.scaled_tile()});
  Args args(l, dq);
  args.inputs().pointer("out_ptr", out).pointer("lse_ptr", lse).pointer("grad_out_ptr", grad_out);
  args.pointer("grad_lse_ptr", grad_lse ? *grad_lse : lse).pointer("grad_q_ptr", grad_q);
  args.pointer("statistics_ptr", statistics).problem(&grad_out).packing();
  args.integer("has_grad_lse", grad_lse.has_value());
  launch(dq, l.device, l.stream, l.grid(ceil_div(l.rows, dq["BLOCK_M"])), args);

  const int64_t block_n = l.scaled_keys();
  const Kernel& dkv = kBackwardKVScaled.find(l.device, {l.dtype, l.head_dim, block_n});
  const int64_t blocks = ceil_div(p.Nk, block_n);
  const int64_t short_rows = l.short_rows(block_n);
  // Each program takes a share of the short keys: a few of them for every multiprocessor. Where the rows that all
  // programs read at a time would not fit the L2 cache, a share is as many as two or four blocks have keys: neighbours
  // read the same rows.
  const int64_t rows_bytes = 4 * l.axes.w_short * p.group() * p.D;
  const int64_t turn = 128 / block_n;  // short keys that a program takes at a time, half of them each warpgroup
  const int64_t span = std::min(short_rows, p.Nk + l.axes.w_short - 1);
  const int64_t few_blocks = std::max<int64_t>(2 * block_n, 64);
  const auto too_large = [&](int64_t share) {
    const bool thrashes = share > few_blocks && kResident * rows_bytes > kL2Bytes;
    return share > turn && (thrashes || blocks * heads * ceil_div(span, share) < 8 * kResident);
  };
  int64_t share = few_blocks;
  while (share < span) share *= 2;
  while (too_large(share)) share /= 2;
  const int64_t splits = ceil_div(span, share);
  // Where all rows fit that cache, the middle shares of all blocks go first: they have the most rows.
  const int64_t together = 4 * p.q.numel() <= kL2Bytes ? blocks * heads : 1;
  const int64_t parts = 2 * splits;  // of each long key: the warpgroups' sums are apart
  const int64_t long_rows = heads * blocks * parts * block_n;
  const Tensor part_k = partial_sums(l, long_rows, 1), part_v = partial_sums(l, long_rows, 1);
  const Tensor part_ks = partial_sums(l, heads * blocks, short_rows),
               part_vs = partial_sums(l, heads * blocks, short_rows);
  // 64 rows come in one copy where 64 heads are whole tokens or part of one, else 8, 16 or 32 heads at a time.
  const auto heads_of_copy = static_cast<int32_t>(std::gcd(p.group(), 64));
  const int32_t tokens_of_copy = heads_of_copy == p.group() ? 64 / heads_of_copy : 1;
  const auto rows_of = [&](const Tensor& t) {
    TensorDescriptor rows = four_dimensional(t);
    rows.box = {1, tokens_of_copy, heads_of_copy, 64};
    return rows;
  };
  Args dkv_args(l, dkv);
  dkv_args.descriptor("q_desc", rows_of(p.q)).descriptor("grad_out_desc", rows_of(grad_out));
  dkv_args.descriptor("statistics_desc", {statistics.const_data_ptr(), {2 * heads, l.rows}, {l.rows, 1}});
  dkv_args.pointer("k_long_ptr", l.axes.k_long).pointer("v_long_ptr", l.axes.v_long);
  dkv_args.pointer("k_short_ptr", l.axes.k_short).pointer("v_short_ptr", l.axes.v_short);
  dkv_args.descriptor("part_k_desc", {part_k.const_data_ptr(), {long_rows, p.D}, {p.D, 1}});
  dkv_args.descriptor("part_v_desc", {part_v.const_data_ptr(), {long_rows, p.D}, {p.D, 1}});
  dkv_args.pointer("part_ks_ptr", part_ks).pointer("part_vs_ptr", part_vs);
  dkv_args.long_strides().short_strides().sizes().packing().integer("num_splits", splits).integer("share", share);
  dkv_args.integer("together", together).integer("copy_rows", tokens_of_copy * heads_of_copy);
  launch(dkv, l.device, l.stream, l.grid(blocks * splits), dkv_args);
  add_splits(l, grad, part_k, part_v, parts, block_n);
  merge_chunks(l, grad, part_ks, part_vs, p.Nk, 1, block_n, short_rows, l.axes.w_long - 1);
}

// dq, delta, dk_short and dv_short.
void query_gradients(const Launch& l, const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& out,
                     const Tensor& lse, const Tensor& delta, const Tensor& grad_q, const GradAxes& grad) {
  const TwoSimplicialAttention& p = l.p;
  const Kernel* skewed = l.skewed_dq();
  const Kernel& dq = skewed ? *skewed : l.select(kBackwardQ);
  const int64_t num_tiles = ceil_div(l.rows, dq["BLOCK_M"]);
  const int64_t chunk_tiles = skewed ? 0 : tiles_per_chunk(l, num_tiles, dq["BLOCK_M"]);
  const int64_t chunk_rows = skewed ? 64 : chunk_tiles * dq["BLOCK_M"];  // a skewed program has a chunk per warpgroup
  const int64_t chunks = ceil_div(l.rows, chunk_rows);
  const int64_t chunk_span = l.chunk_span(chunk_rows);
  const Tensor part_k = partial_sums(l, p.B * p.Hkv * chunks, chunk_span);
  const Tensor part_v = partial_sums(l, p.B * p.Hkv * chunks, chunk_span);
  Args args(l, dq);
  args.inputs().pointer("out_ptr", out).pointer("lse_ptr", lse).pointer("grad_out_ptr", grad_out);
  args.pointer("grad_lse_ptr", grad_lse ? *grad_lse : lse).pointer("grad_q_ptr", grad_q).pointer("delta_ptr", delta);
  args.pointer("part_k_ptr", part_k).pointer("part_v_ptr", part_v).problem(&grad_out).packing();
  args.integer("has_grad_lse", grad_lse.has_value());
  if (!skewed) args.integer("chunk_tiles", chunk_tiles);
  args.integer("chunk_span", chunk_span);
  launch(dq, l.device, l.stream, l.grid(skewed ? num_tiles : chunks), args);
  merge_chunks(l, grad, part_k, part_v, p.Nq, p.group(), chunk_rows, chunk_span, 0);
}

// dk_long and dv_long.
void key_gradients(const Launch& l, const Tensor& grad_out, const Tensor& lse, const Tensor& delta,
                   const GradAxes& grad) {
  const TwoSimplicialAttention& p = l.p;
  const Kernel& dkv = l.dkv();
  const int64_t block_n = dkv["BLOCK_N"];
  const int64_t blocks = ceil_div(p.Nk, block_n);
  const int64_t most_tiles = ceil_div(std::min(l.axes.w_long + block_n, p.Nq) * p.group(), dkv["BLOCK_M"]);
  const int64_t splits = std::clamp<int64_t>(kPrograms / (blocks * p.B * p.Hkv), 1, most_tiles);
  const int64_t parts = splits > 1 ? p.B * p.Hkv * blocks * splits : 0;
  const Tensor part_k = partial_sums(l, parts, block_n), part_v = partial_sums(l, parts, block_n);
  Args args(l, dkv);
  args.inputs().pointer("lse_ptr", lse).pointer("grad_out_ptr", grad_out).pointer("delta_ptr", delta);
  args.pointer("grad_k_ptr", grad.k_long).pointer("grad_v_ptr", grad.v_long);
  args.pointer("part_k_ptr", part_k)
      .pointer("part_v_ptr", part_v)
      .problem(&grad_out)
      .packing()
      .integer("num_splits", splits);
  launch(dkv, l.device, l.stream, l.grid(blocks * splits), args);
  if (splits > 1) add_splits(l, grad, part_k, part_v, splits, block_n);
}

// out and lse, by parts where one program a row would be too few.
void decode(const Launch& l, const Launch::Decode& plan, const Tensor& out, const Tensor& lse) {
  const int64_t all_rows = l.rows * l.p.B * l.p.Hkv;
  const bool whole = plan.parts == 1;
  const Tensor part_out = whole ? lse : partial_sums(l, all_rows, plan.parts);
  const Tensor part_lse = whole ? lse : empty_like_device(lse, {all_rows, plan.parts}, ScalarType::Float);
  Args args(l, plan.kernel);
  args.inputs().pointer("out_ptr", out).pointer("lse_ptr", lse);
  args.pointer("part_out_ptr", part_out).pointer("part_lse_ptr", part_lse);
  args.problem().integer("num_parts", plan.parts).integer("share", plan.share);
  launch(plan.kernel, l.device, l.stream, l.grid(l.rows / plan.kernel["HEADS"] * plan.parts), args);
  if (whole) return;
  const Kernel& merge = kForwardMerge.find(l.device, {l.dtype, plan.kernel["HEAD_DIM"]});
  launch(merge, l.device, l.stream, l.grid(l.rows),
         Args(l, merge)
             .pointer("part_out_ptr", part_out)
             .pointer("part_lse_ptr", part_lse)
             .pointer("out_ptr", out)
             .pointer("lse_ptr", lse)
             .integer("num_queries", l.p.Nq)
             .integer("heads", l.p.Hq)
             .integer("head_dim", l.p.D)
             .integer("num_parts", plan.parts));
}

}  // namespace

void forward_cuda(const TwoSimplicialAttention& p, Tensor& out, Tensor& lse) {
  const Launch l("two_simplicial_attention", p);
  if (const auto plan = l.decode()) return decode(l, *plan, out, lse);
  const Kernel& kernel = l.forward();
  launch(kernel, l.device, l.stream, l.grid(ceil_div(l.rows, kernel["BLOCK_M"])),
         Args(l, kernel).inputs().pointer("out_ptr", out).pointer("lse_ptr", lse).problem().packing());
}

void backward_cuda(const TwoSimplicialAttention& p, const Tensor& grad_out, const std::optional<Tensor>& grad_lse,
                   const Tensor& out, const Tensor& lse, TwoSimplicialGrads& grads) {
  const Launch l("two_simplicial_attention_backward", p);
  const GradAxes grad(l, grads);
  if (l.scales()) return backward_scaled(l, grad_out, grad_lse, out, lse, grads.q, grad);
  const Tensor delta = empty_like_device(lse, {p.B, p.Hq, p.Nq}, ScalarType::Float);
  query_gradients(l, grad_out, grad_lse, out, lse, delta, grads.q, grad);
  key_gradients(l, grad_out, lse, delta, grad);
}

}  // namespace simplex
