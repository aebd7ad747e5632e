// Small planes of channels-last arrays: a lane owns a channel, a warp kWarp neighbouring ones of an image, its planes in
// shared memory that no other warp sees. What is unrolled over all rows and columns knows which taps meet padding.
//
// Compile-time values: T; R, S; H, W (of x and of y); TOP, LEFT (padding).
#pragma once
#include "indices.cuh"
#include "numbers.cuh"

using T = CUCONV_T;

constexpr int kR = CUCONV_R;
constexpr int kS = CUCONV_S;
constexpr int kH = CUCONV_H;
constexpr int kW = CUCONV_W;
constexpr int kTop = CUCONV_TOP;
constexpr int kLeft = CUCONV_LEFT;

constexpr int kWarp = 32;
constexpr int kPixels = kH * kW;
constexpr int kTaps = kR * kS;
// Of shared memory, elements of a plane of all lanes' channels.
constexpr int kPlane = kPixels * kWarp;
// Elements of a copy, copies of a pixel, and pixels that a warp copies at once.
constexpr int kPiece = 16 / static_cast<int>(sizeof(T));
constexpr int kPieces = kWarp / kPiece;
constexpr int kAtOnce = kWarp / kPieces;

static_assert(sizeof(T) <= 4);

// Whether tap (r, s) of output (p, q) is within x.
__device__ constexpr bool meets(int p, int q, int r, int s) {
  const int h = p + r - kTop;
  const int w = q + s - kLeft;
  return 0 <= h && h < kH && 0 <= w && w < kW;
}

// Calls `move(shared element, global element)` for the pieces that are this lane's to copy, of `channels` channels from
// the plane's first on; pixels are `pitch` elements apart.
template <class Move>
__device__ __forceinline__ void for_pieces(int channels, int pitch, int lane, Move move) {
  const int channel = lane % kPieces * kPiece;
  if (channel >= channels) return;
  int64 global = static_cast<int64>(lane / kPieces) * pitch + channel;
  int shared = lane / kPieces * kWarp + channel;
#pragma unroll
  for (int pixel = 0; pixel < kPixels; pixel += kAtOnce) {
    if (pixel + kAtOnce <= kPixels || pixel + lane / kPieces < kPixels) move(shared, global);
    global += static_cast<int64>(kAtOnce) * pitch;
    shared += kAtOnce * kWarp;
  }
}

// A row of this lane's channel.
__device__ __forceinline__ void load_row(const T* plane, int row, int lane, float (&value)[kW]) {
#pragma unroll
  for (int w = 0; w < kW; ++w) {
    Accumulator<T> element[1];
    load_widened<1, true>(plane + (row * kW + w) * kWarp + lane, true, element);
    value[w] = element[0];
  }
}
