// Vector arithmetic and a register-blocked matrix product for the CPU.
//
// No include guard: this file is compiled once per instruction set. Before each inclusion define SIMPLEX_ISA (the
// namespace to put the code in) and SIMPLEX_VECTOR_BYTES. GCC cannot clone templates for several targets, and the right
// register block differs between targets, so `target_clones` would serve neither need.

namespace simplex::SIMPLEX_ISA {

#define SIMPLEX_INLINE inline __attribute__((always_inline))

template <class T>
struct Simd {
  static constexpr int64_t kLanes = SIMPLEX_VECTOR_BYTES / sizeof(T);
  typedef T Vec __attribute__((vector_size(SIMPLEX_VECTOR_BYTES)));
  using Unsigned = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  typedef Unsigned Bits __attribute__((vector_size(SIMPLEX_VECTOR_BYTES)));
};

template <class T>
using Vec = typename Simd<T>::Vec;

template <class T>
SIMPLEX_INLINE Vec<T> load(const T* p) {
  Vec<T> x;
  std::memcpy(&x, p, sizeof(x));  // one unaligned load
  return x;
}

template <class T>
SIMPLEX_INLINE void store(T* p, Vec<T> x) {
  std::memcpy(p, &x, sizeof(x));
}

template <class T>
SIMPLEX_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};  // not x + 0, which would turn -0 into +0 and so cost an instruction
}

template <class T>
SIMPLEX_INLINE double sum(Vec<T> x) {
  double total = 0;
  for (int64_t i = 0; i < Simd<T>::kLanes; ++i) total += x[i];
  return total;
}

// The largest lane that is not NaN.
template <class T>
SIMPLEX_INLINE T maximum(Vec<T> x) {
  T largest = std::numeric_limits<T>::lowest();
  for (int64_t i = 0; i < Simd<T>::kLanes; ++i) largest = x[i] > largest ? x[i] : largest;
  return largest;
}

// What exp_small needs: ln 2 in two parts, whose first has few enough bits that n * high is exact, and a polynomial for
// e^r on [-ln(2)/2, ln(2)/2] interpolated at Chebyshev nodes (relative error 2.6e-9 and 5e-18).
template <class T>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr float kLn2High = 0.693145751953125f, kLn2Low = 1.42860682e-6f;
  static constexpr std::array<float, 7> kPolynomial = {1.0f,          1.00000004f,    0.500000005f,  0.166664154f,
                                                       0.0416663528f, 0.00837513477f, 0.00139411189f};
};
template <>
struct ExpConstants<double> {
  static constexpr double kLn2High = 0.69314718055966295651, kLn2Low = 2.8235290563031577e-13;
  static constexpr std::array<double, 12> kPolynomial = {1.0,
                                                         1.0,
                                                         0.50000000000000184,
                                                         0.166666666666666808,
                                                         0.0416666666664879525,
                                                         0.00833333333331958962,
                                                         0.00138888889523528629,
                                                         0.000198412698900764028,
                                                         0.000024801485441561313,
                                                         2.75572408872298686e-6,
                                                         2.76326547225277919e-7,
                                                         2.51100492048186598e-8};
};

// e^x to about 1 ulp for any x short of overflow: exactly 1 at 0, exactly 0 below the normal numbers, NaN for NaN.
template <class T>
SIMPLEX_INLINE Vec<T> exp_small(Vec<T> x) {
  using Constants = ExpConstants<T>;
  using Limits = std::numeric_limits<T>;
  constexpr int kMantissa = Limits::digits - 1;
  // Adding 1.5 * 2^mantissa rounds to an integer n and leaves n in the low bits of the sum.
  constexpr T kRound = T(1.5) * (int64_t(1) << kMantissa);
  const Vec<T> shifted = x * T(1.4426950408889634) + kRound;
  const Vec<T> n = shifted - kRound;
  const Vec<T> r = x - n * Constants::kLn2High - n * Constants::kLn2Low;
  constexpr auto& c = Constants::kPolynomial;
  Vec<T> y = splat(c.back());
  for (size_t i = 2; i <= c.size(); ++i) y = y * r + c[c.size() - i];
  typename Simd<T>::Bits bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits + (Limits::max_exponent - 1)) << kMantissa;
  Vec<T> power;
  std::memcpy(&power, &bits, sizeof(power));
  return x < T(Limits::min_exponent * 0.6931471805599453) ? Vec<T>{} : y * power;
}

// A matrix element (i, j) lies at data[i * row + j * column].
template <class T>
struct Strided {
  const T* data;
  int64_t row, column;
};

// 32 vector registers hold 8 x 2 accumulators with room to spare, 16 hold 6 x 2.
#ifdef __aarch64__
constexpr int kBlockM = 8;
#else
constexpr int kBlockM = SIMPLEX_VECTOR_BYTES == 64 ? 8 : 6;
#endif

// C[M x N*lanes] = A[M x depth] B, or += where accumulate. The sum is added to C at the end and not continued from C:
// many short sums lose fewer bits than a long one.
template <int M, int N, class T>
SIMPLEX_INLINE void gemm_block(int64_t depth, Strided<T> a, const T* b, int64_t ldb, T* c, int64_t ldc,
                               bool accumulate) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  Vec<T> acc[M][N];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) acc[i][j] = Vec<T>{};
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> row[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) row[j] = load(b + k * ldb + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const Vec<T> factor = splat(a.data[i * a.row + k * a.column]);
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) acc[i][j] += factor * row[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      T* const to = c + i * ldc + j * kLanes;
      store(to, accumulate ? load(to) + acc[i][j] : acc[i][j]);
    }
}

// All rows of one column panel, so that the panel of B stays in the first-level cache. A function of its own for every
// M keeps the accumulators of the remainder in registers, too.
template <int N, class T, int M = kBlockM>
void gemm_panel(int64_t m, int64_t depth, Strided<T> a, const T* b, int64_t ldb, T* c, int64_t ldc, bool accumulate) {
  for (; m >= M; m -= M, a.data += M * a.row, c += M * ldc) gemm_block<M, N>(depth, a, b, ldb, c, ldc, accumulate);
  if constexpr (M > 1) {
    if (m > 0) gemm_panel<N, T, M - 1>(m, depth, a, b, ldb, c, ldc, accumulate);
  }
}

// C[m x n] = A[m x depth] B[depth x n], or += where accumulate. n is a multiple of the vector length; B's and C's rows
// are contiguous.
template <class T>
void gemm(int64_t m, int64_t n, int64_t depth, Strided<T> a, const T* b, int64_t ldb, T* c, int64_t ldc,
          bool accumulate) {
  constexpr int64_t kLanes = Simd<T>::kLanes, kDepth = 64;
  for (int64_t k = 0; k < depth; k += kDepth, a.data += kDepth * a.column, b += kDepth * ldb, accumulate = true) {
    const int64_t terms = std::min(kDepth, depth - k);
    int64_t j = 0;
    for (; j + 2 * kLanes <= n; j += 2 * kLanes) gemm_panel<2, T>(m, terms, a, b + j, ldb, c + j, ldc, accumulate);
    if (j < n) gemm_panel<1, T>(m, terms, a, b + j, ldb, c + j, ldc, accumulate);
  }
}

}  // namespace simplex::SIMPLEX_ISA
