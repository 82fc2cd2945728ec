/* CPU kernels: amax, cast, dequantization, error sums. The specification is reference.py.
 *
 * Every function processes a matrix of `rows` x `columns` elements with dense rows; `stride` is the distance of two
 * rows in elements. A grid assigns scales: element (r, c) has the scale [r / height][c / width] of an array with
 * `across` entries in a row. One scale per tensor, per row or per block differ in height and width only. A run is the
 * part of a row under one scale.
 *
 * The code is plain C for the compiler's vectorizer. A loop first computes 32-bit values into a buffer, and another
 * loop narrows them: a compiler that narrows inside the first loop computes most of it at the wrong width. Floats must
 * stay IEEE: libraries.py forbids fused multiply-add and fast math.
 */

#include <stdint.h>
#if defined(__AVX2__)
#define __MM_MALLOC_H  /* clang's header would include one of a C library, which there need not be */
#include <immintrin.h> /* for conversions that compilers do not vectorize well; F16C comes with AVX2 */
#endif

#define API __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

enum { BF16, FP16, FP32 };

#define INF_BITS 0x7F800000u    /* float32 Inf, and the mask of the exponent */
#define NAN_BITS 0x7FC00000u    /* the NaN that amaxes and scales use */
#define MAX_BITS 0x43E00000u    /* 448, the largest E4M3 value */
#define NORMAL_BITS 0x3C800000u /* 2^-6, the smallest normal E4M3 value */
#define FLOOR_VALUE 1e-12f      /* least amax */

/* Elements of a piece: its intermediate values stay in the first-level cache. error_sums.py has the same pieces. */
enum { PIECE = 1024 };

/* Partial sums of a piece; error_sums.py adds in the same order. */
enum { LANES = 16 };

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
 * It is 2^20 times the power of two of the magnitude, at least 2^20 times that of the smallest normal value. The unit of
 * the last place of the sum is then the step. Sums round to nearest, ties to even.
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

static uint32_t widest16(const uint16_t *restrict w, i64 count) {
    uint16_t best = 0;
    for (i64 i = 0; i < count; i++) {
        uint16_t a = w[i] & 0x7FFF;
        best = a > best ? a : best;
    }
    return best;
}

static uint32_t widest32(const uint32_t *restrict w, i64 count) {
    uint32_t best = 0;
    for (i64 i = 0; i < count; i++) {
        uint32_t a = w[i] & 0x7FFFFFFFu;
        best = a > best ? a : best;
    }
    return best;
}

/* Return the amax of a run as float32 bits, with the canonical NaN. */
INLINE uint32_t run_amax(int dtype, const void *w, i64 count) {
    uint32_t found;
    if (dtype == BF16)
        found = widest16(w, count) << 16;
    else if (dtype == FP16)
        found = bits_of(from_fp16((uint16_t)widest16(w, count)));
    else
        found = widest32(w, count);
    return found > INF_BITS ? NAN_BITS : found;
}

/* Cast a piece: codes in 32 bits, then narrowed. A NaN is rare: `top` tells of it, and it is replaced afterwards. */
INLINE void cast_piece(int dtype, const void *restrict w, i64 at, i64 size, float mult, uint8_t *restrict q) {
    uint32_t codes[PIECE], top = 0;
    if (dtype == BF16) { /* without the buffer of `widen`: a tenth faster */
        const uint16_t *from = (const uint16_t *)w + at;
        for (i64 i = 0; i < size; i++) {
            uint32_t p = bits_of(from_bf16(from[i]) * mult), a = p & 0x7FFFFFFFu;
            top = a > top ? a : top;
            codes[i] = encode(a) | (p >> 24 & 0x80u);
        }
    } else {
        float wide[PIECE];
        widen(dtype, w, at, size, wide);
        for (i64 i = 0; i < size; i++) {
            uint32_t p = bits_of(wide[i] * mult), a = p & 0x7FFFFFFFu;
            top = a > top ? a : top;
            codes[i] = encode(a) | (p >> 24 & 0x80u);
        }
    }
    for (i64 i = 0; i < size; i++) q[i] = (uint8_t)codes[i];
    if (top > INF_BITS) {
        float wide[PIECE];
        widen(dtype, w, at, size, wide);
        for (i64 i = 0; i < size; i++) {
            float p = wide[i] * mult;
            if (p != p) q[i] = 0x7F;
        }
    }
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

/* Cast a row and sum its errors, piece by piece; scales change within a piece. */
INLINE void measure_row(int dtype, const void *restrict w, i64 at, i64 columns, i64 width, const float *restrict mult,
                        const float *restrict scale, uint8_t *restrict q, sums *restrict into) {
    float wide[PIECE], decoded[PIECE];
    for (i64 start = 0; start < columns; start += PIECE) {
        i64 end = least(PIECE, columns - start);
        widen(dtype, w, at + start, end, wide);
        for (i64 c = start; c < start + end;) {
            const i64 stop = least((c / width + 1) * width, start + end), i = c - start;
            measure_run(stop - c, wide + i, mult[c / width], scale[c / width], decoded + i, q + c, into);
            c = stop;
        }
        for (; end % LANES; end++) wide[end] = decoded[end] = 0.0f;
        add_squares(wide, decoded, end, into);
    }
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

/* A function for each dtype, so that no loop tests the dtype. */
#define EACH(NAME, TYPE)                                                                                              \
    static void cast_##NAME(const void *w, i64 at, i64 count, float mult, uint8_t *q) {                               \
        cast_run(TYPE, w, at, count, mult, q);                                                                        \
    }                                                                                                                 \
    static void measure_##NAME(const void *w, i64 at, i64 columns, i64 width, const float *mult, const float *scale,  \
                               uint8_t *q, sums *into) {                                                              \
        measure_row(TYPE, w, at, columns, width, mult, scale, q, into);                                               \
    }                                                                                                                 \
    static void decode_##NAME(const uint8_t *q, i64 count, float scale, void *w, i64 at) {                            \
        decode_run(TYPE, q, count, scale, w, at);                                                                     \
    }
EACH(bf16, BF16)
EACH(fp16, FP16)
EACH(fp32, FP32)

/* Raise amax[r / height][c / width] (int32 bits of float32, 0 at the start) to the amaxes of the runs. */
API void fp8_amax(int dtype, const void *w, i64 rows, i64 columns, i64 stride, i64 height, i64 width, i64 across,
                  int32_t *amax) {
    const i64 size = dtype == FP32 ? 4 : 2;
    for (i64 r = 0; r < rows; r++) {
        const char *row = (const char *)w + r * stride * size;
        int32_t *into = amax + r / height * across;
        for (i64 c = 0; c < columns; c += width) {
            int32_t found = (int32_t)run_amax(dtype, row + c * size, least(width, columns - c));
            if (found > into[c / width]) into[c / width] = found;
        }
    }
}

/* Cast to E4M3 codes `q`, whose rows are `q_stride` apart. */
API void fp8_cast(int dtype, const void *w, i64 rows, i64 columns, i64 stride, i64 height, i64 width, i64 across,
                  const float *mult, uint8_t *q, i64 q_stride) {
    void (*run)(const void *, i64, i64, float, uint8_t *) =
        dtype == BF16 ? cast_bf16 : dtype == FP16 ? cast_fp16 : cast_fp32;
    for (i64 r = 0; r < rows; r++)
        for (i64 c = 0; c < columns; c += width)
            run(w, r * stride + c, least(width, columns - c), mult[r / height * across + c / width],
                q + r * q_stride + c);
}

/* Compute amaxes and cast in one call, one row of scales after the other, so that the cast reads from the cache.
 *
 * amax and mult have the shape of the scales; amax is 0 at the start.
 */
API void fp8_quantize(int dtype, const void *w, i64 rows, i64 columns, i64 stride, i64 height, i64 width, i64 across,
                      int32_t *amax, float *mult, uint8_t *q, i64 q_stride) {
    const i64 size = dtype == FP32 ? 4 : 2;
    for (i64 top = 0; top < rows; top += height) {
        const i64 count = least(height, rows - top), at = top / height * across;
        const char *from = (const char *)w + top * stride * size;
        fp8_amax(dtype, from, count, columns, stride, height, width, across, amax + at);
        for (i64 k = 0; k < across; k++) {
            float value = float_of((uint32_t)amax[at + k]);
            mult[at + k] = 448.0f / (value < FLOOR_VALUE ? FLOOR_VALUE : value);
        }
        fp8_cast(dtype, from, count, columns, stride, height, width, across, mult + at, q + top * q_stride, q_stride);
    }
}

/* Cast as fp8_cast, and store the error sums of every row: signal, noise and largest error, clamped and flushed.
 *
 * The largest error is its square here: its root is exact.
 */
API void fp8_measure(int dtype, const void *w, i64 rows, i64 columns, i64 stride, i64 height, i64 width, i64 across,
                     const float *mult, const float *scale, uint8_t *q, i64 q_stride, double *sums_of, i64 *counts) {
    void (*row)(const void *, i64, i64, i64, const float *, const float *, uint8_t *, sums *) =
        dtype == BF16 ? measure_bf16 : dtype == FP16 ? measure_fp16 : measure_fp32;
    for (i64 r = 0; r < rows; r++) {
        sums found = {0, 0, 0, 0, 0};
        const i64 at = r / height * across;
        row(w, r * stride, columns, width, mult + at, scale + at, q + r * q_stride, &found);
        sums_of[3 * r] = found.signal;
        sums_of[3 * r + 1] = found.noise;
        sums_of[3 * r + 2] = found.noise != found.noise ? found.noise : found.worst; /* a maximum drops a NaN */
        counts[2 * r] = found.clamped;
        counts[2 * r + 1] = found.flushed;
    }
}

/* Dequantize: codes times scales, rounded to the dtype of `w`. */
API void fp8_decode(int dtype, const uint8_t *q, i64 rows, i64 columns, i64 q_stride, i64 height, i64 width, i64 across,
                    const float *scale, void *w, i64 stride) {
    void (*run)(const uint8_t *, i64, float, void *, i64) =
        dtype == BF16 ? decode_bf16 : dtype == FP16 ? decode_fp16 : decode_fp32;
    for (i64 r = 0; r < rows; r++)
        for (i64 c = 0; c < columns; c += width)
            run(q + r * q_stride + c, least(width, columns - c), scale[r / height * across + c / width], w,
                r * stride + c);
}

/* Replace each 16-bit element by its entry in a table of 65,536 codes. */
API void fp8_look_up(const uint16_t *w, i64 count, const uint8_t *table, uint8_t *q) {
    for (i64 i = 0; i < count; i++) q[i] = table[w[i]];
}
