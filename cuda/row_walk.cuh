// How a block of a channels-last gradient of weights goes down the rows of its slab.
//
// All strips of rows of dy, which are of some images at a time and, where dilation makes rows meet rows that lie apart,
// of rows so far apart, are counted as if one were below the other; a slab is any run of these rows. What it has of a
// strip is a step. In one turn a row of dy comes, and what comes new with it of x; behind the step's last row of dy
// come the rows of x that earlier ones still meet.
#pragma once
#include "ptx.cuh"

// Where a block is in its slab.
struct Walk {
  int step;         // that it is in: which images and, of rows that are apart, which of them
  int rows_left;    // of the slab, behind this step
  int t, turns;     // turn of the step, and how many it has
  int count;        // of those, the first that bring a row of dy
  int row;          // of x, the first of the turn, which need not exist
  int first_image;
  int images;       // that exist
};

// Into the step, whose row `first` is the slab's first, and the row of dy there. One row of x meets kRing rows of dy;
// kBehind turns may follow that of the last row of x.
template <bool kDilated, int kRing, int kBehind, class Parameters>
__device__ __forceinline__ int enter_step(const Parameters& g, Walk& walk, int first) {
  const int spacing = kDilated ? g.spacing_h : 1;
  const int set = kDilated ? walk.step / spacing : walk.step;
  const int p = walk.step - set * spacing + first * spacing;
  const int rows = min(g.strip_rows - first, walk.rows_left);
  walk.rows_left -= rows;
  walk.t = 0;
  walk.count = kDilated ? min(rows, max(0, (g.P - p + spacing - 1) / spacing)) : rows;
  walk.row = p * g.stride_h - g.top;
  // Turns behind the last with a row of x would do nothing.
  const int turns_of_x = (g.H - walk.row + g.down - 1) / g.down + kBehind;
  walk.turns = max(max(1, walk.count), min(walk.count + kRing - 1, turns_of_x));
  walk.first_image = set * g.images;
  walk.images = min(g.images, g.N - walk.first_image);
  return p;
}

// To the slab's first step, likewise.
template <bool kDilated, int kRing, int kBehind, class Parameters>
__device__ __forceinline__ int begin_slab(const Parameters& g, Walk& walk, int first_row) {
  walk.step = first_row / g.strip_rows;
  walk.rows_left = min(g.slab_rows, g.rows - first_row);
  return enter_step<kDilated, kRing, kBehind>(g, walk, first_row - walk.step * g.strip_rows);
}
