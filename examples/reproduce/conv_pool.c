/* 5x5 convolution and 2x2 max-pool of float images (n, c, h, h) -> (n, o, m, m), m = (h - 4) / 2, and its gradients.
 * Forward: eight images side by side in one vector. Backward: only the position that won the maximum counts, which is
 * another one in every image, so images go one by one and a vector holds a row of the kernel.
 * SPDX-License-Identifier: BSD-3-Clause */
#include <stdint.h>
#include <string.h>

#define LANES 8
typedef float vec __attribute__((vector_size(32)));
typedef float loose __attribute__((vector_size(32), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(32)));

enum { MAX_PIXELS = 64 * 28 * 28, MAX_WEIGHTS = 64 * 64 * 25, MAX_POOLED = 12 * 12 };

static vec lanes[MAX_PIXELS];
static float image[MAX_PIXELS + 8];

static vec spread(float v) { return (vec){v, v, v, v, v, v, v, v}; }

static void keep(vec *z, float *out, uint8_t *arg, int stride, int images) {
    vec best = z[0];
    ivec where = {0};
    for (int s = 1; s < 4; s++) {
        ivec larger = z[s] > best;
        best = (vec)((larger & (ivec)z[s]) | (~larger & (ivec)best));
        where = (larger & s) | (~larger & where);
    }
    for (int i = 0; i < images; i++) {
        out[i * stride] = best[i];
        arg[i * stride] = (uint8_t)where[i];
    }
}

/* Two positions side by side, m is even; taps of weight zero are left out. */
void conv_pool_forward(const float *x, const float *w, int n, int o, int c, int h, float *out, uint8_t *arg) {
    static int place[MAX_WEIGHTS], first_tap[65];
    static float value[MAX_WEIGHTS];
    int m = (h - 4) / 2, pixels = c * h * h, taps = 0;
    for (int f = 0; f < o; f++) {
        first_tap[f] = taps;
        for (int k = 0; k < c * 25; k++)
            if (w[f * c * 25 + k] != 0.0f) {
                value[taps] = w[f * c * 25 + k];
                place[taps++] = k / 25 * h * h + k % 25 / 5 * h + k % 5;
            }
    }
    first_tap[o] = taps;
    for (int first = 0; first < n; first += LANES) {
        int images = n - first < LANES ? n - first : LANES;
        for (int k = 0; k < pixels; k++)
            for (int i = 0; i < LANES; i++)
                lanes[k][i] = i < images ? x[(size_t)(first + i) * pixels + k] : 0.0f;
        for (int f = 0; f < o; f++)
            for (int p = 0; p < m * m; p += 2) {
                const vec *corner = lanes + 2 * (p / m) * h + 2 * (p % m);
                vec a0 = {0}, a1 = {0}, a2 = {0}, a3 = {0}, b0 = {0}, b1 = {0}, b2 = {0}, b3 = {0};
                for (int t = first_tap[f]; t < first_tap[f + 1]; t++) {
                    const vec *in = corner + place[t];
                    vec u = spread(value[t]);
                    a0 += u * in[0], a1 += u * in[1], a2 += u * in[h], a3 += u * in[h + 1];
                    b0 += u * in[2], b1 += u * in[3], b2 += u * in[h + 2], b3 += u * in[h + 3];
                }
                size_t at = ((size_t)first * o + f) * m * m + p;
                vec a[4] = {a0, a1, a2, a3}, b[4] = {b0, b1, b2, b3};
                keep(a, out + at, arg + at, o * m * m, images);
                keep(b, out + at + 1, arg + at + 1, o * m * m, images);
            }
    }
}

static void weight_gradient(const float *g, const int *offset, const float *in, int n, int h, loose *dw) {
    vec a[5] = {{0}}, b[5] = {{0}};
    int k = 0;
    for (; k + 1 < n; k += 2) {
        vec u = spread(g[k]), v = spread(g[k + 1]);
        for (int ky = 0; ky < 5; ky++) {
            a[ky] += u * *(const loose *)(in + offset[k] + ky * h);
            b[ky] += v * *(const loose *)(in + offset[k + 1] + ky * h);
        }
    }
    for (int ky = 0; ky < 5; ky++)
        dw[ky] += a[ky] + b[ky];
}

/* Adds w * g into one of m buffers by column: neighbours would wait for each other's stores. */
static void input_gradient(const float *g, const int *offset, const vec *w, int m, int h, float *buffers, int size) {
    vec k0 = w[0], k1 = w[1], k2 = w[2], k3 = w[3], k4 = w[4];
    for (int k = 0; k < m * m; k++) {
        float *to = buffers + (k % m) * size + offset[k];
        vec u = spread(g[k]);
        *(loose *)to += u * k0, *(loose *)(to + h) += u * k1, *(loose *)(to + 2 * h) += u * k2;
        *(loose *)(to + 3 * h) += u * k3, *(loose *)(to + 4 * h) += u * k4;
    }
}

/* `dw` (o, c, 5, 8), of which the last three of a row mean nothing, and `dx` (n, c, h, h) or NULL; both start at zero.
 * m * m is even. */
void conv_pool_backward(const float *g, const uint8_t *arg, const float *x, const float *w, int n, int o, int c, int h,
                        float *dw, float *dx) {
    int m = (h - 4) / 2, pixels = c * h * h, size = h * h + 8;
    static int offset[64][MAX_POOLED];
    static float buffers[12 * (28 * 28 + 8)];
    static vec rows[MAX_WEIGHTS / 5];
    for (int k = 0; k < o * c * 5; k++)
        for (int i = 0; i < LANES; i++)
            rows[k][i] = i < 5 ? w[k * 5 + i] : 0.0f;
    for (int i = 0; i < n; i++) {
        memcpy(image, x + (size_t)i * pixels, pixels * sizeof(float));
        const float *gi = g + (size_t)i * o * m * m;
        const uint8_t *ai = arg + (size_t)i * o * m * m;
        for (int f = 0; f < o; f++)
            for (int k = 0; k < m * m; k++) {
                int s = ai[f * m * m + k];
                offset[f][k] = (2 * (k / m) + (s >> 1)) * h + 2 * (k % m) + (s & 1);
            }
        for (int f = 0; f < o; f++)
            for (int ch = 0; ch < c; ch++)
                weight_gradient(gi + f * m * m, offset[f], image + ch * h * h, m * m, h, (loose *)dw + (f * c + ch) * 5);
        if (!dx)
            continue;
        for (int ch = 0; ch < c; ch++) {
            memset(buffers, 0, (size_t)m * size * sizeof(float));
            for (int f = 0; f < o; f++)
                input_gradient(gi + f * m * m, offset[f], rows + (f * c + ch) * 5, m, h, buffers, size);
            float *to = dx + (size_t)i * pixels + ch * h * h;
            for (int b = 0; b < m; b++)
                for (int k = 0; k < h * h; k++)
                    to[k] += buffers[b * size + k];
        }
    }
}
