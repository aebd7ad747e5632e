// The values in between the parts of a separable convolution, made from x: those of the depthwise part, with its bias
// and activation.
//
// Compile-time values: T; CHANNELS_LAST; R, S; VECTOR (elements of a load of x: rows of x, and x itself, start at
// multiples of it); STRIP (outputs of a thread along memory: along a row 1, or VECTOR where stride and dilation along
// rows are 1; they divide the rows of the result; channels-last VECTOR, and 1 with a multiplier); LEFT (padding before
// a row, modulo VECTOR); DEPTHWISE_ACTIVATION.
#pragma once
#include "activations.cuh"
#include "patches.cuh"
#include "pixels.cuh"

constexpr int kR = CUCONV_R;
constexpr int kS = CUCONV_S;
constexpr int kVector = CUCONV_VECTOR;
constexpr int kStrip = CUCONV_STRIP;
constexpr int kLeft = CUCONV_LEFT;
constexpr int kTaps = kR * kS;

// What the middle is made of.
struct Middle {
  int channels;  // C times the multiplier
  int multiplier;
  int H, W;
  int top, left;
  int stride_h, stride_w, dilation_h, dilation_w;
};

// Where a pixel of the result lies.
struct Place {
  int image, p, q;

  __device__ __forceinline__ Place(int image, int p, int q) : image(image), p(p), q(q) {}

  template <class Counted>
  __device__ __forceinline__ Place(const Counted& counted, int pixel) {
    image = divide_by(pixel, counted.counted_magic, counted.counted_shift);
    const int of_image = pixel - image * counted.counted;
    p = divide_by(of_image, counted.row_magic, counted.row_shift);
    q = of_image - p * counted.row;
  }
};

// A value in between, by itself: what `make_strip` makes.
__device__ __noinline__ float middle_plainly(const Middle& g, const T* x, const T* w, const T* bias, int channel,
                                             const Place& at) {
  const int C = g.channels / g.multiplier;
  const int c = channel / g.multiplier;
  float sum = 0;
  for (int tap = 0; tap < kTaps; ++tap) {
    const int h = at.p * g.stride_h - g.top + tap / kS * g.dilation_h;
    const int v = at.q * g.stride_w - g.left + tap % kS * g.dilation_w;
    float value = 0;
    if (within(h, g.H) && within(v, g.W)) {
      const int64 row = static_cast<int64>(at.image) * g.H + h;
      value = kChannelsLast ? widen(x[(row * g.W + v) * C + c])
                            : widen(x[((static_cast<int64>(at.image) * C + c) * g.H + h) * g.W + v]);
    }
    sum = fma(value, float(widen(w[channel * kTaps + tap])), sum);
  }
  if (bias != nullptr) sum += widen(bias[channel]);
  return widen(narrow<T>(activation::CUCONV_DEPTHWISE_ACTIVATION(sum)));
}

// kStrip neighbours along memory of the values in between: columns of a channel, or channels-last channels of a pixel.
// `weights` are those of all channels, as make_weights lays them out.
__device__ __forceinline__ void make_strip(const Middle& g, const T* x, const float* weights, const T* bias,
                                           int channel, const Place& at, float (&sum)[kStrip]) {
  const int C = g.channels / g.multiplier;
  const int c = channel / g.multiplier;
  const int h0 = at.p * g.stride_h - g.top;
  const int v0 = at.q * g.stride_w - g.left;
#pragma unroll
  for (int e = 0; e < kStrip; ++e) sum[e] = 0;
  if constexpr (kChannelsLast) {
    const T* const source = x + ((static_cast<int64>(at.image) * g.H + h0) * g.W + v0) * C + c;
#pragma unroll
    for (int r = 0; r < kR; ++r)
#pragma unroll
      for (int s = 0; s < kS; ++s) {
        const bool exists = within(h0 + r * g.dilation_h, g.H) && within(v0 + s * g.dilation_w, g.W);
        float value[kStrip];
        const int64 offset = (static_cast<int64>(r * g.dilation_h) * g.W + s * g.dilation_w) * C;
        load_widened<kStrip>(source + offset, exists, value);
        const float* const weight = weights + (r * kS + s) * g.channels + channel;
#pragma unroll
        for (int e = 0; e < kStrip; ++e) sum[e] = fma(value[e], weight[e], sum[e]);
      }
  } else {
    constexpr int kSpan = kStrip + kS - 1;
    const T* const source = x + ((static_cast<int64>(at.image) * C + c) * g.H + h0) * g.W + v0;
    const int unit = kStrip > 1 ? 1 : g.dilation_w;
    RowOfPatch<T, kSpan, kVector, kLeft, 0> row;
    row.template place<true>(v0, unit, g.W);
#pragma unroll
    for (int r = 0; r < kR; ++r) {
      float value[kSpan];
      row.load(source + static_cast<int64>(r * g.dilation_h) * g.W, within(h0 + r * g.dilation_h, g.H), unit, value);
      const float* const weight = weights + channel * kTaps + r * kS;
#pragma unroll
      for (int e = 0; e < kStrip; ++e)
#pragma unroll
        for (int s = 0; s < kS; ++s) sum[e] = fma(value[e + s], weight[s], sum[e]);
    }
  }
#pragma unroll
  for (int e = 0; e < kStrip; ++e) {
    if (bias != nullptr) sum[e] += widen(bias[channel + (kChannelsLast ? e : 0)]);
    sum[e] = activation::CUCONV_DEPTHWISE_ACTIVATION(sum[e]);
  }
}

// The taps of all channels as make_strip takes them: of every channel its taps or, channels-last, of every tap its
// channels.
template <int kThreads>
__device__ __forceinline__ void widen_taps(const Middle& g, const T* w, float* taps, int thread) {
  for (int i = thread; i < g.channels * kTaps; i += kThreads) {
    const int channel = i / kTaps;
    taps[kChannelsLast ? (i - channel * kTaps) * g.channels + channel : i] = widen(w[i]);
  }
}
