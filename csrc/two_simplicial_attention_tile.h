// One tile of 2-simplicial attention. Compiled once per instruction set, as gemm.h says, hence no include guard.
//
// A token t of the tile has w_short * group rows, one per (short key t - delta, query head), and all of them see the
// same long keys. Row = (q * k_short); logits = rows @ k_long^T; out += v_short * (P @ v_long). So a block of rows of
// one token is a dense matrix product with no masked element, however narrow the windows are.

#include "gemm.h"

namespace simplex::SIMPLEX_ISA {

using namespace simplex::cpu;

// Rows of one block. More rows reuse a panel of keys more often, fewer keep P and dS closer to the core.
constexpr int64_t kBlockRows = 64;
// Tokens with fewer rows than this share a block with their successors, at the price of a mask.
constexpr int64_t kMinRows = 8;

struct Row {
  int64_t query;        // in the tile: token * group + head
  int64_t short_key;    // in the tile's short range
  int64_t first, last;  // the long keys it sees, [first, last)
};

// The packed operands of a tile, common to both directions.
template <class In>
struct Operands {
  using T = Acc<In>;
  const Problem<In>& p;
  const Tile& tile;
  int64_t ld;                                              // row length of all but the transposed buffers
  int64_t first_token;                                     // absolute position of the tile's first query
  int64_t short_begin, short_count, long_begin, long_end;  // key ranges the tile sees
  int64_t chunk, ld_chunk;                                 // long keys held at a time, and their padded number
  int64_t begin = 0, end = 0;                              // the chunk held now
  T *q, *k_short, *v_short;                                // q carries the scale
  T* k_long_t;                                             // [D, ld_chunk]
  T* v_long;                                               // [chunk, ld]
  T* a;                                                    // [kBlockRows, ld], q * k_short of the current block
  Row rows[kBlockRows];

  Operands(const Problem<In>& p, const Tile& tile, Arena<T>& arena) : p(p), tile(tile), ld(padded(p.D)) {
    first_token = tile.first_query + p.Nk - p.Nq;
    const int64_t past_token = first_token + tile.queries;
    short_begin = std::max(p.start(first_token), first_token - p.w_short + 1);
    short_count = past_token - short_begin;
    long_begin = std::max(p.start(first_token), first_token - p.w_long + 1);
    long_end = past_token;
    // A chunk of keys and all that goes with it stays in the second-level cache; chunks of equal size leave no small
    // rest.
    const int64_t most = std::clamp<int64_t>(65536 / (ld * sizeof(T)), 64, 256);
    const int64_t chunks = (long_end - long_begin + most - 1) / most;
    chunk = (long_end - long_begin + chunks - 1) / chunks;
    ld_chunk =
        round_up(chunk, 16) + 16;  // a panel may start at any key; not a power of two, which would thrash the cache
    q = arena.take(tile.queries * p.group * ld);
    k_short = arena.take(short_count * ld);
    v_short = arena.take(short_count * ld);
    k_long_t = arena.take(p.D * ld_chunk);
    v_long = arena.take(chunk * ld);
    a = arena.take(kBlockRows * ld);
  }

  void pack_short() {
    for (int64_t n = 0; n < tile.queries; ++n)
      for (int64_t g = 0; g < p.group; ++g)
        pack_row(p.q(tile.batch, tile.first_query + n, tile.kv_head * p.group + g), q + (n * p.group + g) * ld,
                 T(p.scale));
    for (int64_t j = 0; j < short_count; ++j) {
      pack_row(p.k_short(tile.batch, short_begin + j, tile.kv_head), k_short + j * ld);
      pack_row(p.v_short(tile.batch, short_begin + j, tile.kv_head), v_short + j * ld);
    }
  }

  void pack_row(const In* __restrict from, T* __restrict to, T scale = 1) const {
    for (int64_t d = 0; d < p.D; ++d) to[d] = T(from[d]) * scale;
    for (int64_t d = p.D; d < ld; ++d) to[d] = 0;
  }

  void pack_transposed(const Rows<const In>& from, T* __restrict to) const {
    for (int64_t j = begin; j < end; ++j) {
      const In* row = from(tile.batch, j, tile.kv_head);
      for (int64_t d = 0; d < p.D; ++d) to[d * ld_chunk + j - begin] = T(row[d]);
    }
  }

  void pack_long(const Rows<const In>& from, T* to) const {
    for (int64_t j = begin; j < end; ++j) pack_row(from(tile.batch, j, tile.kv_head), to + (j - begin) * ld);
  }

  bool next_chunk() {
    begin = end == 0 ? long_begin : end;
    end = std::min(begin + chunk, long_end);
    if (begin == end) return false;
    pack_transposed(p.k_long, k_long_t);
    pack_long(p.v_long, v_long);
    return true;
  }

  void rewind() { end = 0; }

  // Short keys of a token, times the heads.
  int64_t rows_of(int64_t token) const {
    const int64_t position = first_token + token;
    return std::min(p.w_short, position - p.start(position) + 1) * p.group;
  }
};

// Rows [first_row, ...) of the tokens [token, token + tokens), against the long keys [begin, end).
struct Block {
  int64_t rows, begin, end;
};

template <class In>
Block fill_block(Operands<In>& o, int64_t token, int64_t tokens, int64_t first_row) {
  using T = Acc<In>;
  int64_t count = 0;
  for (int64_t n = token; n < token + tokens; ++n) {
    const int64_t position = o.first_token + n;
    const int64_t stop = std::min(o.rows_of(n), first_row + kBlockRows);
    for (int64_t r = first_row; r < stop; ++r) {
      Row& row = o.rows[count];
      row = {n * o.p.group + r % o.p.group, position - r / o.p.group - o.short_begin,
             std::max({o.begin, position - o.p.w_long + 1, o.p.start(position)}), std::min(o.end, position + 1)};
      const T* __restrict q = o.q + row.query * o.ld;
      const T* __restrict k = o.k_short + row.short_key * o.ld;
      T* __restrict a = o.a + count * o.ld;
      for (int64_t d = 0; d < o.ld; ++d) a[d] = q[d] * k[d];
      ++count;
    }
  }
  return {count, o.rows[0].first, o.rows[count - 1].last};
}

// Calls body(block) for every block of rows that sees a key of the current chunk, in an order that depends on shapes
// alone.
template <class In, class Body>
SIMPLEX_INLINE void for_each_block(Operands<In>& o, Body body) {
  const int64_t full = o.p.w_short * o.p.group;
  const int64_t step = std::max<int64_t>(1, kMinRows / full);
  const auto start = [&](int64_t token) { return o.p.start(o.first_token + token); };
  for (int64_t token = 0, tokens; token < o.tile.queries; token += tokens) {
    // Of one sequence: a mask only multiplies by 0, and what another sequence holds need not be finite.
    const int64_t most = std::min(step, o.tile.queries - token);
    for (tokens = 1; tokens < most && start(token + tokens) == start(token);) ++tokens;
    for (int64_t row = 0; row < o.rows_of(token + tokens - 1); row += kBlockRows) {
      const Block block = fill_block(o, token, tokens, row);
      if (block.begin < block.end) body(block);
    }
  }
}

// s[row, key] = rows[row] . keys[key] for a block, `unseen` where the row's query does not see the key. Returns the
// length of a row of s: a whole number of vectors.
template <class In, class T = Acc<In>>
int64_t scores(const Operands<In>& o, const Block& block, const T* rows, const T* keys_t, T unseen, T* s) {
  const int64_t width = round_up(block.end - block.begin, Simd<T>::kLanes);
  gemm<T>(block.rows, width, o.p.D, {rows, o.ld, 1}, keys_t + block.begin - o.begin, o.ld_chunk, s, o.ld_chunk, false);
  for (int64_t r = 0; r < block.rows; ++r, s += o.ld_chunk) {
    const int64_t first = std::clamp<int64_t>(o.rows[r].first - block.begin, 0, width);
    const int64_t last = std::clamp<int64_t>(o.rows[r].last - block.begin, first, width);
    std::fill(s, s + first, unseen);
    std::fill(s + last, s + width, unseen);
  }
  return width;
}

template <class In, class T = Acc<In>>
int64_t logits(const Operands<In>& o, const Block& block, T* s) {
  return scores(o, block, o.a, o.k_long_t, std::numeric_limits<T>::lowest(), s);
}

template <class T>
SIMPLEX_INLINE void scale_row(int64_t n, T factor, T* x) {
  for (int64_t d = 0; d < n; ++d) x[d] *= factor;
}

template <class T>
SIMPLEX_INLINE void add_product(int64_t n, const T* __restrict x, const T* __restrict y, T* __restrict sum) {
  for (int64_t d = 0; d < n; ++d) sum[d] += x[d] * y[d];
}

template <class In>
struct ForwardBuffers {
  using T = Acc<In>;
  T *out, *row_max;  // per query of the tile: unnormalised output, maximum
  double* row_sum;   // and sum of exp(logit - maximum)
  T* s;              // [kBlockRows, ld_chunk] logits, then probabilities
  T* product;        // [kBlockRows, ld]

  ForwardBuffers(const Operands<In>& o, Arena<T>& arena) {
    const int64_t queries = o.tile.queries * o.p.group;
    out = arena.take(queries * o.ld);
    row_max = arena.take(queries);
    row_sum = arena.template take_as<double>(queries);
    s = arena.take(kBlockRows * o.ld_chunk);
    product = arena.take(kBlockRows * o.ld);
  }
};

// The largest logits decide first, so that all rows of a query use one maximum when they are added up.
template <class In>
void online_softmax(const Operands<In>& o, const Block& block, int64_t width, ForwardBuffers<In>& f) {
  using T = Acc<In>;
  constexpr int64_t kLanes = Simd<T>::kLanes;
  for (int64_t r = 0; r < block.rows; ++r) {
    const Row& row = o.rows[r];
    const T* const s = f.s + r * o.ld_chunk;
    Vec<T> largest = splat(f.row_max[row.query]);
    for (int64_t j = 0; j < width; j += kLanes) {
      const Vec<T> x = load(s + j);
      largest = x > largest ? x : largest;
    }
    const T now = maximum<T>(largest), before = f.row_max[row.query];
    if (now == before) continue;
    const T shrink = std::exp(before - now);
    f.row_max[row.query] = now;
    f.row_sum[row.query] *= shrink;
    scale_row(o.ld, shrink, f.out + row.query * o.ld);
  }
  for (int64_t r = 0; r < block.rows; ++r) {
    const int64_t query = o.rows[r].query;
    T* const s = f.s + r * o.ld_chunk;
    const Vec<T> largest = splat(f.row_max[query]);
    Vec<T> total{};
    for (int64_t j = 0; j < width; j += kLanes) {
      const Vec<T> x = exp_small<T>(load(s + j) - largest);
      store(s + j, x);
      total += x;
    }
    f.row_sum[query] += sum<T>(total);
  }
}

template <class In>
void forward_tile(const Problem<In>& p, const Tile& tile, Arena<Acc<In>>& arena) {
  using T = Acc<In>;
  Operands<In> o(p, tile, arena);
  ForwardBuffers<In> f(o, arena);
  if (!f.s) return;  // only the size of the buffers was asked for
  const int64_t queries = tile.queries * p.group;
  std::fill(f.out, f.out + queries * o.ld, T(0));
  std::fill(f.row_max, f.row_max + queries, std::numeric_limits<T>::lowest());  // finite: lowest - lowest is not NaN
  std::fill(f.row_sum, f.row_sum + queries, 0.0);
  o.pack_short();
  while (o.next_chunk()) {
    for_each_block(o, [&](const Block& block) {
      const int64_t keys = block.end - block.begin, offset = block.begin - o.begin;
      online_softmax(o, block, logits(o, block, f.s), f);
      gemm<T>(block.rows, o.ld, keys, {f.s, o.ld_chunk, 1}, o.v_long + offset * o.ld, o.ld, f.product, o.ld, false);
      for (int64_t r = 0; r < block.rows; ++r) {
        const Row& row = o.rows[r];
        add_product(o.ld, o.v_short + row.short_key * o.ld, f.product + r * o.ld, f.out + row.query * o.ld);
      }
    });
  }
  for (int64_t i = 0; i < queries; ++i) {
    const int64_t n = tile.first_query + i / p.group, head = tile.kv_head * p.group + i % p.group;
    In* const out = p.out(tile.batch, n, head);
    for (int64_t d = 0; d < p.D; ++d) out[d] = In(T(f.out[i * o.ld + d] / f.row_sum[i]));
    p.lse[(tile.batch * p.Hq + head) * p.Nq + n] = T(f.row_max[i] + std::log(f.row_sum[i]));
  }
}

}  // namespace simplex::SIMPLEX_ISA

#include "two_simplicial_attention_tile_backward.h"

#undef SIMPLEX_INLINE
#undef SIMPLEX_ISA
#undef SIMPLEX_VECTOR_BYTES
