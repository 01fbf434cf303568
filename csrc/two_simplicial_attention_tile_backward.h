// The backward pass of one tile; two_simplicial_attention_tile.h includes it, once per instruction set.

namespace simplex::SIMPLEX_ISA {

template <class In>
struct BackwardBuffers {
  using T = Acc<In>;
  T *grad_out, *grad_q;      // [queries, ld]
  T *lse, *grad_lse;         // per query
  double *total, *weighted;  // per query: sum of P and of P * dP
  T *k_long, *v_long_t;      // [chunk, ld], [D, ld_chunk]
  T* b;                      // [kBlockRows, ld], grad_out * v_short of the current block
  T *prob, *grad_s;          // [kBlockRows, ld_chunk]: exp(logit - lse); dP, then dS
  T* product;                // [kBlockRows, ld]
  KeyGrads<T> keys;

  BackwardBuffers(const Operands<In>& o, Arena<T>& arena) {
    const int64_t queries = o.tile.queries * o.p.group;
    grad_out = arena.take(queries * o.ld);
    grad_q = arena.take(queries * o.ld);
    lse = arena.take(queries);
    grad_lse = arena.take(queries);
    total = arena.template take_as<double>(queries);
    weighted = arena.template take_as<double>(queries);
    k_long = arena.take(o.chunk * o.ld);
    v_long_t = arena.take(o.p.D * o.ld_chunk);
    b = arena.take(kBlockRows * o.ld);
    prob = arena.take(kBlockRows * o.ld_chunk);
    grad_s = arena.take(kBlockRows * o.ld_chunk);
    product = arena.take(kBlockRows * o.ld);
    keys = {o.short_begin, o.short_count, o.long_begin, o.long_end - o.long_begin, nullptr, nullptr, nullptr, nullptr};
    keys.k_short = arena.take(keys.short_count * o.ld);
    keys.v_short = arena.take(keys.short_count * o.ld);
    keys.k_long = arena.take(keys.long_count * o.ld);
    keys.v_long = arena.take(keys.long_count * o.ld);
  }

  void clear(const Operands<In>& o) {
    const int64_t queries = o.tile.queries * o.p.group;
    std::fill(grad_q, grad_q + queries * o.ld, T(0));
    std::fill(total, total + queries, 0.0);
    std::fill(weighted, weighted + queries, 0.0);
    std::fill(keys.k_short, keys.k_short + keys.short_count * o.ld, T(0));
    std::fill(keys.v_short, keys.v_short + keys.short_count * o.ld, T(0));
    std::fill(keys.k_long, keys.k_long + keys.long_count * o.ld, T(0));
    std::fill(keys.v_long, keys.v_long + keys.long_count * o.ld, T(0));
  }
};

template <class In>
void pack_queries(const Operands<In>& o, BackwardBuffers<In>& f) {
  const Problem<In>& p = o.p;
  const Tile& tile = o.tile;
  for (int64_t i = 0; i < tile.queries * p.group; ++i) {
    const int64_t n = tile.first_query + i / p.group, head = tile.kv_head * p.group + i % p.group;
    const int64_t statistic = (tile.batch * p.Hq + head) * p.Nq + n;
    o.pack_row(p.grad_out(tile.batch, n, head), f.grad_out + i * o.ld);
    f.lse[i] = p.saved_lse[statistic];
    f.grad_lse[i] = p.grad_lse ? p.grad_lse[statistic] : 0;
  }
}

// Fills prob and grad_s = dP of a block and returns the length of their rows.
template <class In>
int64_t probabilities(const Operands<In>& o, const Block& block, BackwardBuffers<In>& f) {
  using T = Acc<In>;
  for (int64_t r = 0; r < block.rows; ++r) {
    const T* __restrict grad_out = f.grad_out + o.rows[r].query * o.ld;
    const T* __restrict v = o.v_short + o.rows[r].short_key * o.ld;
    T* __restrict b = f.b + r * o.ld;
    for (int64_t d = 0; d < o.ld; ++d) b[d] = grad_out[d] * v[d];
  }
  scores(o, block, f.b, f.v_long_t, T(0), f.grad_s);
  const int64_t width = logits(o, block, f.prob);
  for (int64_t r = 0; r < block.rows; ++r) {
    T* const prob = f.prob + r * o.ld_chunk;
    const Vec<T> lse = splat(f.lse[o.rows[r].query]);
    for (int64_t j = 0; j < width; j += Simd<T>::kLanes) store(prob + j, exp_small<T>(load(prob + j) - lse));
  }
  return width;
}

// Textbook code takes exp(logit - lse) for P and grad_out . out for sum P dP. Both are off: an lse of 10 rounded to
// fp32 by up to 5e-7, which all of its query's probabilities share, and grad_out . out by the rounding of out, so that
// dP - sum P dP leaves a rest where one pair takes all the weight. Added up from the very numbers that they are
// subtracted from, the errors cancel; a query with a single visible pair gets score gradients of exactly 0.
template <class In>
void add_statistics(const Operands<In>& o, const Block& block, int64_t width, BackwardBuffers<In>& f) {
  using T = Acc<In>;
  for (int64_t r = 0; r < block.rows; ++r) {
    const T* const prob = f.prob + r * o.ld_chunk;
    const T* const grad = f.grad_s + r * o.ld_chunk;
    Vec<T> total{}, weighted{};
    for (int64_t j = 0; j < width; j += Simd<T>::kLanes) {
      const Vec<T> x = load(prob + j);
      total += x;
      weighted += x * load(grad + j);
    }
    f.total[o.rows[r].query] += sum<T>(total);
    f.weighted[o.rows[r].query] += sum<T>(weighted);
  }
}

// Normalises P; dP -> dS = P (dP - sum P dP + grad_lse).
template <class In>
void softmax_backward(const Operands<In>& o, const Block& block, int64_t width, BackwardBuffers<In>& f) {
  using T = Acc<In>;
  for (int64_t r = 0; r < block.rows; ++r) {
    const int64_t query = o.rows[r].query;
    T* const prob = f.prob + r * o.ld_chunk;
    T* const grad_s = f.grad_s + r * o.ld_chunk;
    const Vec<T> inverse = splat(T(1 / f.total[query]));
    const Vec<T> mean = splat(T(f.weighted[query] / f.total[query])), grad_lse = splat(f.grad_lse[query]);
    for (int64_t j = 0; j < width; j += Simd<T>::kLanes) {
      const Vec<T> x = load(prob + j) * inverse;
      store(prob + j, x);
      store(grad_s + j, x * (load(grad_s + j) - mean + grad_lse));
    }
  }
}

// From P and dS of a block to its shares in all five gradients.
template <class In>
void add_gradients(const Operands<In>& o, const Block& block, BackwardBuffers<In>& f) {
  using T = Acc<In>;
  const int64_t keys = block.end - block.begin, source = (block.begin - o.begin) * o.ld;
  gemm<T>(block.rows, o.ld, keys, {f.grad_s, o.ld_chunk, 1}, f.k_long + source, o.ld, f.product, o.ld, false);
  for (int64_t r = 0; r < block.rows; ++r) {
    const int64_t query = o.rows[r].query * o.ld, short_key = o.rows[r].short_key * o.ld;
    add_product(o.ld, o.k_short + short_key, f.product + r * o.ld, f.grad_q + query);
    add_product(o.ld, o.q + query, f.product + r * o.ld, f.keys.k_short + short_key);
  }
  gemm<T>(block.rows, o.ld, keys, {f.prob, o.ld_chunk, 1}, o.v_long + source, o.ld, f.product, o.ld, false);
  for (int64_t r = 0; r < block.rows; ++r) {
    const int64_t query = o.rows[r].query * o.ld, short_key = o.rows[r].short_key * o.ld;
    add_product(o.ld, f.grad_out + query, f.product + r * o.ld, f.keys.v_short + short_key);
  }
  const int64_t target = (block.begin - o.long_begin) * o.ld;
  gemm<T>(keys, o.ld, block.rows, {f.grad_s, 1, o.ld_chunk}, o.a, o.ld, f.keys.k_long + target, o.ld, true);
  gemm<T>(keys, o.ld, block.rows, {f.prob, 1, o.ld_chunk}, f.b, o.ld, f.keys.v_long + target, o.ld, true);
}

// Writes grad_q and returns what the tile adds to the gradients of keys and values.
template <class In>
KeyGrads<Acc<In>> backward_tile(const Problem<In>& p, const Tile& tile, Arena<Acc<In>>& arena) {
  using T = Acc<In>;
  Operands<In> o(p, tile, arena);
  BackwardBuffers<In> f(o, arena);
  if (!f.prob) return f.keys;  // only the size of the buffers was asked for
  o.pack_short();
  pack_queries(o, f);
  f.clear(o);
  const auto next_chunk = [&] {
    if (!o.next_chunk()) return false;
    o.pack_transposed(p.v_long, f.v_long_t);
    o.pack_long(p.k_long, f.k_long);
    return true;
  };
  // Where a block holds all pairs of its queries, their statistics come with it; else they take a pass of their own.
  const bool whole = p.w_short * p.group <= kBlockRows && o.chunk == o.long_end - o.long_begin;
  if (!whole) {
    while (next_chunk())
      for_each_block(o, [&](const Block& block) { add_statistics(o, block, probabilities(o, block, f), f); });
    o.rewind();
  }
  while (next_chunk())
    for_each_block(o, [&](const Block& block) {
      const int64_t width = probabilities(o, block, f);
      if (whole) add_statistics(o, block, width, f);
      softmax_backward(o, block, width, f);
      add_gradients(o, block, f);
    });
  for (int64_t i = 0; i < tile.queries * p.group; ++i) {
    In* const grad_q = p.grad_q(tile.batch, tile.first_query + i / p.group, tile.kv_head * p.group + i % p.group);
    for (int64_t d = 0; d < p.D; ++d) grad_q[d] = In(T(p.scale) * f.grad_q[i * o.ld + d]);
  }
  return f.keys;
}

}  // namespace simplex::SIMPLEX_ISA
