/* CPU kernels: amax, cast, dequantization, error sums, best scales of rows. The specification is reference.py.
 *
 * Every function processes a matrix of `rows` x `columns` elements with dense rows; `stride` is the distance of two
 * rows in elements. A grid assigns scales: element (r, c) has the scale [r / height][c / width] of an array with
 * `across` entries in a row. One scale per tensor, per row or per block differ in height and width only. A run is the
 * part of a row under one scale.
 *
 * The code is plain C for the compiler's vectorizer. A loop first computes 32-bit values into a buffer, and another
 * loop narrows them: a compiler that narrows inside the first loop computes most of it at the wrong width. The casts of
 * BF16, the dtype of most checkpoints, have AVX2 instructions besides, which halve the work. Floats must stay IEEE:
 * libraries.py forbids compilers to fuse additions with multiplications, and fast math.
 */

#include <stdint.h>
#if defined(__AVX2__)
#define __MM_MALLOC_H  /* clang's header would include one of a C library, which there need not be */
#include <immintrin.h> /* for conversions that compilers do not vectorize well; F16C comes with AVX2 */
#endif

#define API __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

enum { BF16, FP16, FP32 };

/* Rules for scales: a division, or a power of two as in DeepGEMM or as in OCP Microscaling. */
enum { NONE, POWER_OF_TWO, MX };

#define INF_BITS 0x7F800000u    /* float32 Inf, and the mask of the exponent */
#define NAN_BITS 0x7FC00000u    /* the NaN that amaxes and scales use */
#define MAX_BITS 0x43E00000u    /* 448, the largest E4M3 value */
#define NORMAL_BITS 0x3C800000u /* 2^-6, the smallest normal E4M3 value */
#define FLOOR_VALUE 1e-12f      /* least amax */
#define MAX_MANTISSA 0x600000u  /* mantissa of 448 */
/* Factors of an amax of which the best is chosen, as float32 bits: 2^(k/8). */
enum { CANDIDATES = 8 };
static const uint32_t FACTORS[CANDIDATES] = {0x3F800000u, 0x3F8B95C2u, 0x3F9837F0u, 0x3FA5FED7u,
                                             0x3FB504F3u, 0x3FC5672Au, 0x3FD744FDu, 0x3FEAC0C7u};
#define LEAST_POWER_OF_TWO (-22)
#define LEAST_MX (-127)

/* Elements of a piece: its intermediate values stay in the first-level cache. error_sums.py has the same pieces. */
enum { PIECE = 1024 };

/* Partial sums of a piece; error_sums.py adds in the same order. */
enum { LANES = 16 };

/* BF16 elements that the AVX2 code processes at a time. */
enum { STEP = 32 };

/* Elements of a group, a run of one block of OCP Microscaling. Loops of this constant length are unrolled. The AVX2 code
 * takes SET groups together, so that they share the search for their maxima and the arithmetic of their scales. */
enum { GROUP = 32, SET = 8 };

typedef int64_t i64;
typedef union { float value; uint32_t bits; } word;

INLINE uint32_t bits_of(float x) { return (word){.value = x}.bits; }
INLINE float float_of(uint32_t b) { return (word){.bits = b}.value; }
INLINE i64 least(i64 a, i64 b) { return a < b ? a : b; }

INLINE float from_bf16(uint16_t h) { return float_of((uint32_t)h << 16); }

INLINE float from_fp16(uint16_t h) {
    uint32_t magnitude = h & 0x7FFFu;
    uint32_t normal = (magnitude << 13) + (112u << 23);
    normal += magnitude >= 0x7C00u ? 112u << 23 : 0u; /* Inf and NaN */
    uint32_t tiny = bits_of(float_of((magnitude << 13) + (113u << 23)) - 0x1p-14f);
    return float_of((magnitude < 0x400u ? tiny : normal) | (uint32_t)(h & 0x8000u) << 16);
}

/* Convert `count` elements of a dtype, from element `at` on, to float32. */
INLINE void widen(int dtype, const void *restrict w, i64 at, i64 count, float *restrict wide) {
    if (dtype == BF16) {
        const uint16_t *from = (const uint16_t *)w + at;
        for (i64 i = 0; i < count; i++) wide[i] = from_bf16(from[i]);
    } else if (dtype == FP16) {
        const uint16_t *from = (const uint16_t *)w + at;
        i64 i = 0;
#if defined(__AVX2__)
        for (; i + 8 <= count; i += 8)
            _mm256_storeu_ps(wide + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + i))));
#endif
        for (; i < count; i++) wide[i] = from_fp16(from[i]);
    } else {
        const float *from = (const float *)w + at;
        for (i64 i = 0; i < count; i++) wide[i] = from[i];
    }
}

INLINE uint32_t to_bf16(float x) {
    uint32_t b = bits_of(x);
    uint32_t rounded = (b + 0x7FFFu + ((b >> 16) & 1u)) >> 16;
    return (b & 0x7FFFFFFFu) > INF_BITS ? 0x7FC0u : rounded;
}

INLINE uint32_t to_fp16(float x) {
    uint32_t b = bits_of(x), a = b & 0x7FFFFFFFu;
    uint32_t normal = ((a + 0xFFFu + ((a >> 13) & 1u)) >> 13) - (112u << 10);
    uint32_t tiny = bits_of(float_of(a) + 0.5f) - 0x3F000000u; /* the sum rounds to a multiple of 2^-24 */
    uint32_t h = a < 0x38800000u ? tiny : normal;
    h = a >= 0x477FF000u ? 0x7C00u : h; /* 65520 and above round to Inf */
    h = a > INF_BITS ? 0x7E00u : h;
    return h | (b >> 16 & 0x8000u);
}

/* Return the addend that rounds a magnitude to the step of E4M3 in a float32 sum, as bits.
 *
 * It is 2^20 times the power of two of the magnitude, at least 2^20 times that of the smallest normal value. The unit
 * of the last place of the sum is then the step. Sums round to nearest, ties to even.
 */
INLINE uint32_t step_of(uint32_t a) {
    uint32_t power = a & INF_BITS;
    return (power > NORMAL_BITS ? power : NORMAL_BITS) + (20u << 23);
}

/* Return the low 7 bits of a code: the low bits of the sum count the steps above the power of two. */
INLINE uint32_t code_of(float sum, uint32_t step) {
    return (bits_of(sum) + (step >> 20) - ((NORMAL_BITS + (20u << 23)) >> 20)) & 0x7Fu;
}

/* Return the low 7 bits of the code of a magnitude: rounded to nearest, ties to even, saturated at 448. No NaN. */
INLINE uint32_t encode(uint32_t a) {
    a = a > MAX_BITS ? MAX_BITS : a;
    uint32_t step = step_of(a);
    return code_of(float_of(a) + float_of(step), step);
}

INLINE float decode(uint32_t code) {
    uint32_t magnitude = code & 0x7Fu;
    uint32_t normal = (magnitude << 20) + (120u << 23);
    uint32_t tiny = bits_of((float)(int32_t)magnitude * 0x1p-9f);
    uint32_t b = magnitude < 8u ? tiny : normal;
    b = magnitude == 0x7Fu ? NAN_BITS : b;
    return float_of(b | (code & 0x80u) << 24);
}

/* Signed, because plain x86-64 has a maximum of signed 16-bit integers only. */
INLINE uint32_t widest16(const uint16_t *restrict w, i64 count) {
    int16_t best = 0;
    for (i64 i = 0; i < count; i++) {
        int16_t a = (int16_t)(w[i] & 0x7FFF);
        best = a > best ? a : best;
    }
    return (uint32_t)best;
}

INLINE uint32_t widest32(const uint32_t *restrict w, i64 count) {
    uint32_t best = 0;
    for (i64 i = 0; i < count; i++) {
        uint32_t a = w[i] & 0x7FFFFFFFu;
        best = a > best ? a : best;
    }
    return best;
}

/* Return the amax of a run, from element `at` on, as float32 bits, with the canonical NaN. */
INLINE uint32_t run_amax(int dtype, const void *w, i64 at, i64 count) {
    uint32_t found;
    if (dtype == BF16)
        found = widest16((const uint16_t *)w + at, count) << 16;
    else if (dtype == FP16)
        found = bits_of(from_fp16((uint16_t)widest16((const uint16_t *)w + at, count)));
    else
        found = widest32((const uint32_t *)w + at, count);
    return found > INF_BITS ? NAN_BITS : found;
}

/* Return the power of two whose reciprocal is the scale of a finite amax. */
INLINE float power_of(int rule, int32_t amax) {
    const int32_t least_of = rule == MX ? LEAST_MX : LEAST_POWER_OF_TWO;
    const int32_t found = (amax >> 23) - 135 + ((amax & 0x7FFFFF) > (int32_t)MAX_MANTISSA);
    const int32_t exponent = found > least_of ? found : least_of;
    return float_of((uint32_t)(127 - (rule == MX && amax <= 0 ? 0 : exponent)) << 23);
}

/* Return the multiplier of a scale; its reciprocal is the stored scale. */
INLINE float mult_of(int rule, int32_t amax) {
    const float value = float_of((uint32_t)amax);
    if (rule != NONE && value < float_of(INF_BITS)) return power_of(rule, amax);
    return 448.0f / (value < FLOOR_VALUE ? FLOOR_VALUE : value);
}

/* Cast a piece: codes in 32 bits, then narrowed. A NaN is rare: `top` tells of it, and it is replaced afterwards. */
INLINE void cast_any(int dtype, const void *restrict w, i64 at, i64 size, float mult, uint8_t *restrict q) {
    uint32_t codes[PIECE], top = 0;
    float wide[PIECE];
    widen(dtype, w, at, size, wide);
    for (i64 i = 0; i < size; i++) {
        uint32_t p = bits_of(wide[i] * mult), a = p & 0x7FFFFFFFu;
        top = a > top ? a : top;
        codes[i] = encode(a) | (p >> 24 & 0x80u);
    }
    for (i64 i = 0; i < size; i++) q[i] = (uint8_t)codes[i];
    if (top > INF_BITS)
        for (i64 i = 0; i < size; i++) {
            float p = wide[i] * mult;
            if (p != p) q[i] = 0x7F;
        }
}

#if defined(__AVX2__)
/* The vectors below hold magnitudes times 8. The exponent of the smallest normal value, plus 20, then is a multiple of
 * 16, so that code_of needs no constant: the code is the sum of the low bits and of the exponent, modulo 128. Values
 * that a code cannot hold are not clamped: LIMIT tells of them, and of NaN. */
#define LIMIT 464.0f         /* the largest value that rounds to 448 */
#define MULT_LIMIT 0x1p+124f /* the largest multiplier that is finite times 8 */

INLINE __m256i splat(uint32_t bits) { return _mm256_set1_epi32((int32_t)bits); }
INLINE __m256i int_of(__m256 x) { return _mm256_castps_si256(x); }
INLINE __m256 real_of(__m256i x) { return _mm256_castsi256_ps(x); }

/* step_of, for magnitudes times 8. */
INLINE __m256i steps_of(__m256 p) {
    __m256i power = _mm256_and_si256(int_of(p), splat(INF_BITS));
    power = _mm256_max_epi32(power, splat(NORMAL_BITS + (3u << 23)));
    return _mm256_add_epi32(power, splat(20u << 23));
}

/* Codes in the low 7 bits of every lane, below other bits. */
INLINE __m256i codes_of(__m256 sum) { return _mm256_add_epi32(int_of(sum), _mm256_srli_epi32(int_of(sum), 20)); }

/* Magnitudes of the even and odd ones of 16 BF16 elements. */
INLINE __m256 evens(__m256i w) { return real_of(_mm256_slli_epi32(w, 16)); }
INLINE __m256 odds(__m256i w) { return real_of(_mm256_and_si256(w, splat(0xFFFF0000u))); }

/* Codes without signs of 16 elements, in 16 bits each. */
INLINE __m256i codes_16(__m256i even, __m256i odd) {
    return _mm256_and_si256(_mm256_blend_epi16(even, _mm256_slli_epi32(odd, 16), 0xAA), splat(0x007F007Fu));
}

/* Add the signs of 16 elements to their codes. */
INLINE __m256i signed_16(__m256i codes, __m256i w) {
    return _mm256_or_si256(codes, _mm256_and_si256(_mm256_srli_epi16(w, 8), splat(0x00800080u)));
}

/* Narrow 32 codes of 16 bits. */
INLINE __m256i narrow_32(__m256i first, __m256i second) {
    return _mm256_permute4x64_epi64(_mm256_packus_epi16(first, second), 0xD8);
}

/* The largest of 16 magnitudes. The instruction finds the smallest, here the largest of the complements. */
INLINE float largest_16(__m256i magnitudes) {
    __m128i eight = _mm_max_epu16(_mm256_castsi256_si128(magnitudes), _mm256_extracti128_si256(magnitudes, 1));
    eight = _mm_minpos_epu16(_mm_xor_si128(eight, _mm_set1_epi32(-1)));
    return from_bf16((uint16_t)~_mm_cvtsi128_si32(eight));
}

INLINE __m256i cast_16(__m256i w, __m256i magnitudes, __m256 mult) {
    __m256 even = _mm256_mul_ps(evens(magnitudes), mult), odd = _mm256_mul_ps(odds(magnitudes), mult);
    even = _mm256_add_ps(even, real_of(steps_of(even)));
    odd = _mm256_add_ps(odd, real_of(steps_of(odd)));
    return signed_16(codes_16(codes_of(even), codes_of(odd)), w);
}

/* Cast the first elements of a BF16 piece, a multiple of STEP. Returns their number; 0 if one is above LIMIT or NaN, or
 * if 8 times the multiplier overflows. */
INLINE i64 cast_vectors(const uint16_t *restrict w, i64 size, float mult, uint8_t *restrict q) {
    const __m256 factor = _mm256_set1_ps(mult * 8.0f);
    const __m256i magnitude = splat(0x7FFF7FFFu);
    __m256i top = _mm256_setzero_si256();
    i64 i = 0;
    for (; i + STEP <= size; i += STEP) {
        __m256i w0 = _mm256_loadu_si256((const __m256i *)(w + i));
        __m256i w1 = _mm256_loadu_si256((const __m256i *)(w + i + 16));
        __m256i a0 = _mm256_and_si256(w0, magnitude), a1 = _mm256_and_si256(w1, magnitude);
        top = _mm256_max_epu16(top, _mm256_max_epu16(a0, a1));
        _mm256_storeu_si256((__m256i *)(q + i), narrow_32(cast_16(w0, a0, factor), cast_16(w1, a1, factor)));
    }
    return largest_16(top) * mult <= LIMIT && mult <= MULT_LIMIT ? i : 0;
}

/* Return the amaxes of a set of BF16 groups as float32 bits, with the canonical NaN. */
INLINE __m256i amaxes_of(const uint16_t *restrict w) {
    const __m256i magnitude = splat(0x7FFF7FFFu);
    __m256i top[SET];
    for (int k = 0; k < SET; k++) {
        __m256i w0 = _mm256_loadu_si256((const __m256i *)(w + k * GROUP));
        __m256i w1 = _mm256_loadu_si256((const __m256i *)(w + k * GROUP + 16));
        top[k] = _mm256_max_epu16(_mm256_and_si256(w0, magnitude), _mm256_and_si256(w1, magnitude));
    }
    /* Each step merges two vectors, until 128 bits hold one maximum of every group. */
    for (int k = 0; k < 4; k++)
        top[k] = _mm256_max_epu16(_mm256_unpacklo_epi16(top[2 * k], top[2 * k + 1]),
                                  _mm256_unpackhi_epi16(top[2 * k], top[2 * k + 1]));
    for (int k = 0; k < 2; k++)
        top[k] = _mm256_max_epu16(_mm256_unpacklo_epi32(top[2 * k], top[2 * k + 1]),
                                  _mm256_unpackhi_epi32(top[2 * k], top[2 * k + 1]));
    __m256i all = _mm256_max_epu16(_mm256_unpacklo_epi64(top[0], top[1]), _mm256_unpackhi_epi64(top[0], top[1]));
    __m128i last = _mm_max_epu16(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
    __m256i bits = _mm256_slli_epi32(_mm256_cvtepu16_epi32(last), 16);
    return _mm256_blendv_epi8(bits, splat(NAN_BITS), _mm256_cmpgt_epi32(bits, splat(INF_BITS)));
}

/* mult_of, for a set of amaxes, which are numbers below Inf if the rule is a power of two. */
INLINE __m256 mults_of(int rule, __m256i amax) {
    if (rule == NONE)
        return _mm256_div_ps(_mm256_set1_ps(448.0f), _mm256_max_ps(_mm256_set1_ps(FLOOR_VALUE), real_of(amax)));
    /* The sum carries into the exponent if the mantissa exceeds that of 448. */
    __m256i power = _mm256_max_epi32(amax, _mm256_setzero_si256());
    power = _mm256_srli_epi32(_mm256_add_epi32(power, splat(0x7FFFFFu - MAX_MANTISSA)), 23);
    power = _mm256_sub_epi32(splat(127 + 135), power);
    power = _mm256_min_epi32(power, splat((uint32_t)(127 - (rule == MX ? LEAST_MX : LEAST_POWER_OF_TWO))));
    if (rule == MX) power = _mm256_blendv_epi8(splat(127), power, _mm256_cmpgt_epi32(amax, _mm256_setzero_si256()));
    return real_of(_mm256_slli_epi32(power, 23));
}

/* Store the multipliers of a set of BF16 groups. Returns 0 if an element of the groups, whose amaxes are `own`, exceeds
 * `limit` or is NaN, an amax is not finite, or 8 times a multiplier overflows. */
INLINE int mults_fit(int rule, __m256i amax, __m256i own, float limit, float *restrict mults) {
    __m256 found = mults_of(rule, amax), product = _mm256_mul_ps(real_of(own), found);
    __m256 fit = _mm256_cmp_ps(product, _mm256_set1_ps(limit), _CMP_LE_OQ);
    fit = _mm256_and_ps(fit, _mm256_cmp_ps(real_of(amax), real_of(splat(INF_BITS)), _CMP_LT_OQ));
    fit = _mm256_and_ps(fit, _mm256_cmp_ps(found, _mm256_set1_ps(MULT_LIMIT), _CMP_LE_OQ));
    _mm256_storeu_ps(mults, found);
    return _mm256_movemask_ps(fit) == 0xFF;
}

/* Cast the whole sets of a row of BF16 groups. Amaxes are those of `amax`, or with `own` those of the groups, which
 * `amax` receives. Returns the number of elements. */
INLINE i64 cast_sets(const uint16_t *restrict w, i64 columns, int rule, int own, int32_t *restrict amax,
                     uint8_t *restrict q) {
    const __m256i magnitude = splat(0x7FFF7FFFu);
    i64 c = 0;
    for (; c + SET * GROUP <= columns; c += SET * GROUP, amax += SET) {
        float mults[SET];
        __m256i found = amaxes_of(w + c), used = found;
        if (own)
            _mm256_storeu_si256((__m256i *)amax, found);
        else
            used = _mm256_loadu_si256((const __m256i *)amax);
        if (!mults_fit(rule, used, found, LIMIT, mults)) {
            for (int k = 0; k < SET; k++)
                cast_any(BF16, w, c + k * GROUP, GROUP, mult_of(rule, amax[k]), q + c + k * GROUP);
            continue;
        }
        for (int k = 0; k < SET; k++) {
            const i64 i = c + k * GROUP;
            const __m256 factor = _mm256_set1_ps(mults[k] * 8.0f);
            __m256i w0 = _mm256_loadu_si256((const __m256i *)(w + i));
            __m256i w1 = _mm256_loadu_si256((const __m256i *)(w + i + 16));
            w0 = cast_16(w0, _mm256_and_si256(w0, magnitude), factor);
            w1 = cast_16(w1, _mm256_and_si256(w1, magnitude), factor);
            _mm256_storeu_si256((__m256i *)(q + i), narrow_32(w0, w1));
        }
    }
    return c;
}
#endif

INLINE void cast_piece(int dtype, const void *restrict w, i64 at, i64 size, float mult, uint8_t *restrict q) {
    i64 done = 0;
#if defined(__AVX2__)
    if (dtype == BF16) done = cast_vectors((const uint16_t *)w + at, size, mult, q);
#endif
    if (done < size) cast_any(dtype, w, at + done, size - done, mult, q + done);
}

INLINE void cast_run(int dtype, const void *restrict w, i64 at, i64 count, float mult, uint8_t *restrict q) {
    for (i64 start = 0; start < count; start += PIECE)
        cast_piece(dtype, w, at + start, least(PIECE, count - start), mult, q + start);
}

typedef struct { double signal, noise, worst; i64 clamped, flushed; } sums;

/* Add the squares of `size` values and of their errors, a multiple of LANES, to the sums of a row. */
INLINE void add_squares(const float *restrict values, const float *restrict decoded, i64 size, sums *restrict into) {
    double signal[LANES], noise[LANES], worst[LANES];
#if defined(__AVX2__)
    enum { VECTORS = LANES / 4 };
    __m256d s[VECTORS], n[VECTORS], m[VECTORS];
    for (int k = 0; k < VECTORS; k++) s[k] = n[k] = m[k] = _mm256_setzero_pd();
    for (i64 i = 0; i < size; i += LANES)
        for (int k = 0; k < VECTORS; k++) {
            __m256d value = _mm256_cvtps_pd(_mm_loadu_ps(values + i + 4 * k));
            __m256d error = _mm256_sub_pd(_mm256_cvtps_pd(_mm_loadu_ps(decoded + i + 4 * k)), value);
            error = _mm256_mul_pd(error, error);
            s[k] = _mm256_add_pd(s[k], _mm256_mul_pd(value, value));
            n[k] = _mm256_add_pd(n[k], error);
            m[k] = _mm256_max_pd(error, m[k]); /* the second operand, if the first is NaN */
        }
    for (int k = 0; k < VECTORS; k++) {
        _mm256_storeu_pd(signal + 4 * k, s[k]);
        _mm256_storeu_pd(noise + 4 * k, n[k]);
        _mm256_storeu_pd(worst + 4 * k, m[k]);
    }
#else
    for (int l = 0; l < LANES; l++) signal[l] = noise[l] = worst[l] = 0;
    for (i64 i = 0; i < size; i += LANES)
        for (int l = 0; l < LANES; l++) {
            double value = values[i + l], error = (double)decoded[i + l] - value;
            error *= error;
            signal[l] += value * value;
            noise[l] += error;
            worst[l] = error > worst[l] ? error : worst[l];
        }
#endif
    double all_signal = 0, all_noise = 0;
    for (int l = 0; l < LANES; l++) {
        all_signal += signal[l];
        all_noise += noise[l];
        into->worst = worst[l] > into->worst ? worst[l] : into->worst;
    }
    into->signal += all_signal;
    into->noise += all_noise;
}

/* Cast elements under one scale. The sum that rounds a magnitude also yields the value of its code. */
INLINE void measure_run(i64 size, const float *restrict wide, float mult, float scale, float *restrict decoded,
                        uint8_t *restrict q, sums *restrict into) {
    uint32_t codes[PIECE], top = 0, clamped = 0, flushed = 0;
    for (i64 i = 0; i < size; i++) {
        uint32_t p = bits_of(wide[i] * mult), a = p & 0x7FFFFFFFu, sign = p & 0x80000000u;
        top = a > top ? a : top;
        clamped += a > MAX_BITS;
        a = a > MAX_BITS ? MAX_BITS : a;
        uint32_t step = step_of(a);
        float sum = float_of(a) + float_of(step), value = sum - float_of(step);
        codes[i] = code_of(sum, step) | sign >> 24;
        flushed += (value == 0.0f) & (wide[i] != 0.0f);
        decoded[i] = float_of(bits_of(value) | sign) * scale;
    }
    for (i64 i = 0; i < size; i++) q[i] = (uint8_t)codes[i];
    if (top > INF_BITS)
        for (i64 i = 0; i < size; i++) {
            float p = wide[i] * mult;
            if (p != p) {
                q[i] = 0x7F;
                decoded[i] = p;
                clamped--;
            }
        }
    into->clamped += clamped;
    into->flushed += flushed;
}

#if defined(__AVX2__)
/* Add squares to LANES; those of float32 are exact in float64, so that the fused addition rounds as the sum alone. */
INLINE __m256d add_exact(const float *x, __m256d sum) {
    __m256d wide = _mm256_cvtps_pd(_mm_loadu_ps(x));
    return _mm256_fmadd_pd(wide, wide, sum);
}

/* Return the sum of squares of a piece in the order of its LANES. Every 16 elements are 8 even and 8 odd LANES. */
INLINE double squares(const float *x, i64 size) {
    __m256d even_low = _mm256_setzero_pd(), even_high = even_low, odd_low = even_low, odd_high = even_low;
    for (i64 i = 0; i < size; i += LANES) {
        even_low = add_exact(x + i, even_low);
        even_high = add_exact(x + i + 4, even_high);
        odd_low = add_exact(x + i + 8, odd_low);
        odd_high = add_exact(x + i + 12, odd_high);
    }
    double held[LANES], sum = 0;
    _mm256_storeu_pd(held, even_low);
    _mm256_storeu_pd(held + 4, even_high);
    _mm256_storeu_pd(held + 8, odd_low);
    _mm256_storeu_pd(held + 12, odd_high);
    for (int l = 0; l < LANES; l++) sum += held[l % 2 * 8 + l / 2];
    return sum;
}

/* Cast magnitudes, and return the decoded codes; `sum` holds the codes. */
INLINE __m256 decoded_of(__m256 value, __m256 mult, __m256 scale, __m256 *sum) {
    __m256 p = _mm256_mul_ps(value, mult), step = real_of(steps_of(p));
    *sum = _mm256_add_ps(p, step);
    return _mm256_mul_ps(_mm256_sub_ps(*sum, step), scale);
}

/* Cast magnitudes, and return their codes and the errors of the decoded codes. */
INLINE __m256i cast_back(__m256 value, __m256 mult, __m256 scale, __m256 *error) {
    __m256 sum;
    *error = _mm256_sub_ps(decoded_of(value, mult, scale, &sum), value);
    return codes_of(sum);
}

/* Cast a BF16 piece and sum its errors, as measure_run and add_squares do, but with magnitudes: a value and its code
 * have one sign. Returns 0, and leaves the sums, if a run does not begin and end at multiples of STEP, or an element
 * needs a clamp or is NaN.
 *
 * The difference of a BF16 value and its decoded code is exact in float32: both are multiples of the smaller unit in
 * the last place of the two, and a BF16 value has only 8 significant bits, so that the difference has at most 24.
 */
INLINE int measure_vectors(const uint16_t *restrict w, i64 start, i64 size, i64 width, int rule,
                           const int32_t *restrict amax, uint8_t *restrict q, sums *restrict into) {
    const __m256i magnitude = splat(0x7FFFFFFFu);
    const i64 end = start + size;
    __m256i worst = _mm256_setzero_si256(), low = magnitude;
    float values[PIECE], errors[PIECE], *value = values, *error = errors, held[8];
    if (size % STEP || (width % STEP && width < end)) return 0;
    i64 run = start / width;
    for (i64 c = start; c < end; run++) {
        const i64 stop = least((run + 1) * width, end);
        const float mult = mult_of(rule, amax[run]);
        const __m256 by = _mm256_set1_ps(mult * 8.0f), back = _mm256_set1_ps(1.0f / mult / 8.0f);
        __m256i top = _mm256_setzero_si256();
        for (; c < stop; c += STEP) {
            __m256i codes[2];
            for (int k = 0; k < 2; k++, value += LANES, error += LANES) {
                __m256i v = _mm256_loadu_si256((const __m256i *)(w + c + k * LANES));
                __m256i a = _mm256_and_si256(v, splat(0x7FFF7FFFu));
                __m256 even = evens(a), odd = odds(a), even_error, odd_error;
                __m256i even_codes = cast_back(even, by, back, &even_error);
                __m256i odd_codes = cast_back(odd, by, back, &odd_error);
                __m256i found = codes_16(even_codes, odd_codes);
                codes[k] = signed_16(found, v);
                top = _mm256_max_epu16(top, a);
                low = _mm256_min_epu16(low, found);
                worst = _mm256_max_epi32(worst, _mm256_and_si256(int_of(even_error), magnitude));
                worst = _mm256_max_epi32(worst, _mm256_and_si256(int_of(odd_error), magnitude));
                _mm256_storeu_ps(value, even);
                _mm256_storeu_ps(value + 8, odd);
                _mm256_storeu_ps(error, even_error);
                _mm256_storeu_ps(error + 8, odd_error);
            }
            _mm256_storeu_si256((__m256i *)(q + c), narrow_32(codes[0], codes[1]));
        }
        if (!(largest_16(top) * mult <= 448.0f && mult <= MULT_LIMIT)) return 0;
    }
    _mm256_storeu_ps(held, real_of(worst));
    for (int l = 0; l < 8; l++) {
        double square = (double)held[l] * held[l];
        into->worst = square > into->worst ? square : into->worst;
    }
    if (_mm256_movemask_epi8(_mm256_cmpeq_epi16(low, _mm256_setzero_si256()))) { /* few pieces have codes of zero */
        uint32_t flushed = 0;
        for (i64 c = start; c < end; c++) flushed += !(q[c] & 0x7F) & !!(w[c] & 0x7FFF);
        into->flushed += flushed;
    }
    into->signal += squares(values, size);
    into->noise += squares(errors, size);
    return 1;
}
#endif

/* Cast a row and sum its errors, piece by piece; scales change within a piece. */
INLINE void measure_row(int dtype, const void *restrict w, i64 at, i64 columns, i64 width, int rule,
                        const int32_t *restrict amax, uint8_t *restrict q, sums *restrict into) {
    float wide[PIECE], decoded[PIECE];
    for (i64 start = 0; start < columns; start += PIECE) {
        i64 end = least(PIECE, columns - start);
#if defined(__AVX2__)
        if (dtype == BF16 && measure_vectors((const uint16_t *)w + at, start, end, width, rule, amax, q, into)) continue;
#endif
        widen(dtype, w, at + start, end, wide);
        i64 run = start / width;
        for (i64 c = start; c < start + end; run++) {
            const i64 stop = least((run + 1) * width, start + end), i = c - start;
            const float mult = mult_of(rule, amax[run]);
            if (stop - c == GROUP)
                measure_run(GROUP, wide + i, mult, 1.0f / mult, decoded + i, q + c, into);
            else
                measure_run(stop - c, wide + i, mult, 1.0f / mult, decoded + i, q + c, into);
            c = stop;
        }
        for (; end % LANES; end++) wide[end] = decoded[end] = 0.0f;
        add_squares(wide, decoded, end, into);
    }
}

/* Return the noise of a piece of magnitudes, a multiple of LANES, in the order of add_squares. A value and its code have
 * one sign, which no square shows. No product exceeds LIMIT, so that no clamp is needed. */
INLINE double noise_of(int dtype, const float *restrict values, i64 size, float mult, float scale) {
    double lanes[LANES], noise = 0;
#if defined(__AVX2__)
    const __m256 by = _mm256_set1_ps(mult * 8.0f), back = _mm256_set1_ps(scale / 8.0f);
    __m256d n[LANES / 4];
    for (int k = 0; k < LANES / 4; k++) n[k] = _mm256_setzero_pd();
    for (i64 i = 0; i < size; i += LANES)
        for (int k = 0; k < LANES / 8; k++) {
            __m256 value = _mm256_loadu_ps(values + i + 8 * k), sum, decoded = decoded_of(value, by, back, &sum);
            if (dtype == BF16) { /* exact differences and squares, as in measure_vectors and add_exact */
                __m256 error = _mm256_sub_ps(decoded, value);
                __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(error));
                __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(error, 1));
                n[2 * k] = _mm256_fmadd_pd(low, low, n[2 * k]);
                n[2 * k + 1] = _mm256_fmadd_pd(high, high, n[2 * k + 1]);
            } else {
                __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(decoded));
                __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(decoded, 1));
                low = _mm256_sub_pd(low, _mm256_cvtps_pd(_mm256_castps256_ps128(value)));
                high = _mm256_sub_pd(high, _mm256_cvtps_pd(_mm256_extractf128_ps(value, 1)));
                n[2 * k] = _mm256_add_pd(n[2 * k], _mm256_mul_pd(low, low));
                n[2 * k + 1] = _mm256_add_pd(n[2 * k + 1], _mm256_mul_pd(high, high));
            }
        }
    for (int k = 0; k < LANES / 4; k++) _mm256_storeu_pd(lanes + 4 * k, n[k]);
#else
    (void)dtype;
    float decoded[PIECE];
    for (i64 i = 0; i < size; i++) {
        float p = values[i] * mult, step = float_of(step_of(bits_of(p)));
        decoded[i] = (p + step - step) * scale;
    }
    for (int l = 0; l < LANES; l++) lanes[l] = 0;
    for (i64 i = 0; i < size; i += LANES)
        for (int l = 0; l < LANES; l++) {
            double error = (double)decoded[i + l] - values[i + l];
            lanes[l] += error * error;
        }
#endif
    for (int l = 0; l < LANES; l++) noise += lanes[l];
    return noise;
}

/* Return the candidate of a row with the least noise, as float32 bits. Each piece is read once, and cast for all. */
INLINE uint32_t best_of_row(int dtype, const void *restrict w, i64 at, i64 columns) {
    const uint32_t own = run_amax(dtype, w, at, columns);
    float wide[PIECE], mults[CANDIDATES];
    uint32_t amax[CANDIDATES];
    double noise[CANDIDATES];
    int best = 0;
    if (own >= INF_BITS) return own;
    for (int k = 0; k < CANDIDATES; k++) {
        amax[k] = bits_of(float_of(own) * float_of(FACTORS[k]));
        mults[k] = mult_of(NONE, (int32_t)amax[k]);
        noise[k] = 0;
    }
    for (i64 start = 0; start < columns; start += PIECE) {
        i64 size = least(PIECE, columns - start);
        widen(dtype, w, at + start, size, wide);
        for (; size % LANES; size++) wide[size] = 0.0f;
        for (i64 i = 0; i < size; i++) wide[i] = float_of(bits_of(wide[i]) & 0x7FFFFFFFu);
        for (int k = 0; k < CANDIDATES; k++) noise[k] += noise_of(dtype, wide, size, mults[k], 1.0f / mults[k]);
    }
    for (int k = 1; k < CANDIDATES; k++)
        if (amax[k] < INF_BITS && noise[k] < noise[best]) best = k;
    return amax[best];
}

INLINE void decode_run(int dtype, const uint8_t *restrict q, i64 count, float scale, void *restrict w, i64 at) {
    uint32_t wide[PIECE];
    for (i64 start = 0; start < count; start += PIECE) {
        const i64 size = least(PIECE, count - start);
        if (dtype == FP32) {
            float *into = (float *)w + at + start;
            for (i64 i = 0; i < size; i++) into[i] = decode(q[start + i]) * scale;
            continue;
        }
        uint16_t *into = (uint16_t *)w + at + start;
        if (dtype == BF16)
            for (i64 i = 0; i < size; i++) wide[i] = to_bf16(decode(q[start + i]) * scale);
        else
            for (i64 i = 0; i < size; i++) wide[i] = to_fp16(decode(q[start + i]) * scale);
        for (i64 i = 0; i < size; i++) into[i] = (uint16_t)wide[i];
    }
}

/* Functions of a row, from element `at` on, with the scales of the row. */

INLINE void amax_row(int dtype, const void *restrict w, i64 at, i64 columns, i64 width, int32_t *restrict amax) {
    i64 c = 0;
#if defined(__AVX2__)
    if (dtype == BF16 && width == GROUP)
        for (; c + SET * GROUP <= columns; c += SET * GROUP, amax += SET) {
            __m256i found = amaxes_of((const uint16_t *)w + at + c);
            found = _mm256_max_epi32(found, _mm256_loadu_si256((const __m256i *)amax));
            _mm256_storeu_si256((__m256i *)amax, found);
        }
#endif
    for (; c < columns; c += width, amax++) {
        const i64 count = least(width, columns - c);
        const int32_t found = (int32_t)run_amax(dtype, w, at + c, count == GROUP ? GROUP : count);
        if (found > *amax) *amax = found;
    }
}

/* Cast with the amaxes of `amax`, or with `own` with those of the runs, which `amax` receives. */
INLINE void cast_row(int dtype, const void *restrict w, i64 at, i64 columns, i64 width, int rule, int own,
                     int32_t *restrict amax, uint8_t *restrict q) {
    i64 c = 0;
#if defined(__AVX2__)
    if (dtype == BF16 && width == GROUP) c = cast_sets((const uint16_t *)w + at, columns, rule, own, amax, q);
#endif
    amax += c / width;
    if (own) amax_row(dtype, w, at + c, columns - c, width, amax);
    for (; c < columns; c += width) {
        const i64 count = least(width, columns - c);
        const float mult = mult_of(rule, *amax++);
        if (count == GROUP)
            cast_piece(dtype, w, at + c, GROUP, mult, q + c);
        else
            cast_run(dtype, w, at + c, count, mult, q + c);
    }
}

INLINE void decode_row(int dtype, const uint8_t *restrict q, i64 columns, i64 width, const float *restrict scale,
                       void *restrict w, i64 at) {
    for (i64 c = 0; c < columns; c += width) {
        const i64 count = least(width, columns - c);
        if (count == GROUP)
            decode_run(dtype, q + c, GROUP, *scale++, w, at + c);
        else
            decode_run(dtype, q + c, count, *scale++, w, at + c);
    }
}

/* A function for each dtype, so that no loop tests the dtype. */
#define EACH(NAME, TYPE)                                                                                              \
    static void amax_##NAME(const void *w, i64 at, i64 columns, i64 width, int32_t *amax) {                           \
        amax_row(TYPE, w, at, columns, width, amax);                                                                  \
    }                                                                                                                 \
    static void cast_##NAME(const void *w, i64 at, i64 columns, i64 width, int rule, int own, int32_t *amax,          \
                            uint8_t *q) {                                                                             \
        cast_row(TYPE, w, at, columns, width, rule, own, amax, q);                                                    \
    }                                                                                                                 \
    static void measure_##NAME(const void *w, i64 at, i64 columns, i64 width, int rule, const int32_t *amax,          \
                               uint8_t *q, sums *into) {                                                              \
        measure_row(TYPE, w, at, columns, width, rule, amax, q, into);                                                \
    }                                                                                                                 \
    static uint32_t best_##NAME(const void *w, i64 at, i64 columns) { return best_of_row(TYPE, w, at, columns); }     \
    static void decode_##NAME(const uint8_t *q, i64 columns, i64 width, const float *scale, void *w, i64 at) {        \
        decode_row(TYPE, q, columns, width, scale, w, at);                                                            \
    }
EACH(bf16, BF16)
EACH(fp16, FP16)
EACH(fp32, FP32)

typedef void (*cast_function)(const void *, i64, i64, i64, int, int, int32_t *, uint8_t *);
INLINE cast_function cast_of(int dtype) { return dtype == BF16 ? cast_bf16 : dtype == FP16 ? cast_fp16 : cast_fp32; }

/* Raise amax[r / height][c / width] (int32 bits of float32, 0 at the start) to the amaxes of the runs. */
API void fp8_amax(int dtype, const void *w, i64 rows, i64 columns, i64 stride, i64 height, i64 width, i64 across,
                  int32_t *amax) {
    void (*row)(const void *, i64, i64, i64, int32_t *) =
        dtype == BF16 ? amax_bf16 : dtype == FP16 ? amax_fp16 : amax_fp32;
    for (i64 r = 0; r < rows; r++) row(w, r * stride, columns, width, amax + r / height * across);
}

/* Store the candidates of the rows with the least noise, as int32 bits of float32. */
API void fp8_best_amax(int dtype, const void *w, i64 rows, i64 columns, i64 stride, int32_t *amax) {
    uint32_t (*row)(const void *, i64, i64) = dtype == BF16 ? best_bf16 : dtype == FP16 ? best_fp16 : best_fp32;
    for (i64 r = 0; r < rows; r++) amax[r] = (int32_t)row(w, r * stride, columns);
}

/* Cast to E4M3 codes `q`, whose rows are `q_stride` apart, with known amaxes. */
API void fp8_cast(int dtype, const void *w, i64 rows, i64 columns, i64 stride, i64 height, i64 width, i64 across,
                  int rule, const int32_t *amax, uint8_t *q, i64 q_stride) {
    cast_function row = cast_of(dtype);
    for (i64 r = 0; r < rows; r++) /* only own amaxes are written */
        row(w, r * stride, columns, width, rule, 0, (int32_t *)amax + r / height * across, q + r * q_stride);
}

/* Cast as fp8_cast, and store the error sums of every row: signal, noise and largest error, clamped and flushed.
 *
 * The largest error is its square here: its root is exact.
 */
API void fp8_measure(int dtype, const void *w, i64 rows, i64 columns, i64 stride, i64 height, i64 width, i64 across,
                     int rule, const int32_t *amax, uint8_t *q, i64 q_stride, double *sums_of, i64 *counts) {
    void (*row)(const void *, i64, i64, i64, int, const int32_t *, uint8_t *, sums *) =
        dtype == BF16 ? measure_bf16 : dtype == FP16 ? measure_fp16 : measure_fp32;
    for (i64 r = 0; r < rows; r++) {
        sums found = {0, 0, 0, 0, 0};
        row(w, r * stride, columns, width, rule, amax + r / height * across, q + r * q_stride, &found);
        sums_of[3 * r] = found.signal;
        sums_of[3 * r + 1] = found.noise;
        sums_of[3 * r + 2] = found.noise != found.noise ? found.noise : found.worst; /* a maximum drops a NaN */
        counts[2 * r] = found.clamped;
        counts[2 * r + 1] = found.flushed;
    }
}

/* Compute amaxes and cast in one call, one row of scales after the other. If scales belong to rows or to small blocks,
 * the cast reads from the cache.
 *
 * amax is 0 at the start. Error sums are stored as by fp8_measure, unless `sums_of` is null.
 */
API void fp8_quantize(int dtype, const void *w, i64 rows, i64 columns, i64 stride, i64 height, i64 width, i64 across,
                      int rule, int32_t *amax, uint8_t *q, i64 q_stride, double *sums_of, i64 *counts) {
    const i64 size = dtype == FP32 ? 4 : 2;
    cast_function row = cast_of(dtype);
    for (i64 top = 0; top < rows; top += height) {
        const i64 count = least(height, rows - top);
        const char *from = (const char *)w + top * stride * size;
        int32_t *of = amax + top / height * across;
        uint8_t *codes = q + top * q_stride;
        if (count == 1 && !sums_of) {
            row(from, 0, columns, width, rule, 1, of, codes);
            continue;
        }
        fp8_amax(dtype, from, count, columns, stride, height, width, across, of);
        if (sums_of)
            fp8_measure(dtype, from, count, columns, stride, height, width, across, rule, of, codes, q_stride,
                        sums_of + 3 * top, counts + 2 * top);
        else
            fp8_cast(dtype, from, count, columns, stride, height, width, across, rule, of, codes, q_stride);
    }
}

/* Dequantize: codes times scales, rounded to the dtype of `w`. */
API void fp8_decode(int dtype, const uint8_t *q, i64 rows, i64 columns, i64 q_stride, i64 height, i64 width, i64 across,
                    const float *scale, void *w, i64 stride) {
    void (*row)(const uint8_t *, i64, i64, const float *, void *, i64) =
        dtype == BF16 ? decode_bf16 : dtype == FP16 ? decode_fp16 : decode_fp32;
    for (i64 r = 0; r < rows; r++)
        row(q + r * q_stride, columns, width, scale + r / height * across, w, r * stride);
}

/* Store the scales of amaxes: the reciprocals of the multipliers, with the canonical NaN. */
API void fp8_scales(int rule, const int32_t *restrict amax, i64 count, float *restrict scale) {
    for (i64 i = 0; i < count; i++) {
        const float found = 1.0f / mult_of(rule, amax[i]);
        scale[i] = found != found ? float_of(NAN_BITS) : found;
    }
}

/* Replace each 16-bit element by its entry in a table of 65,536 codes. */
API void fp8_look_up(const uint16_t *w, i64 count, const uint8_t *table, uint8_t *q) {
    for (i64 i = 0; i < count; i++) q[i] = table[w[i]];
}
