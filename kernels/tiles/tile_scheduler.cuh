// The persistent grid's tile scheduler: blocks take work tiles from a list, longest first, until none is left. Results
// do not depend on which block takes which.
#pragma once
#include "../common/types.cuh"

struct TileScheduler {
  unsigned* next_tile;  // in global memory, 0 before the launch and after it
  int tiles;
  int* shared;  // one number of shared memory

  // The next work tile for this block, or a number >= tiles when there is none. Every block calls it until then.
  DEVICE int next() const {
    __syncthreads();  // everyone is done with the shared memory of the tile before
    if (threadIdx.x == 0) {
      const unsigned tile = atomicAdd(next_tile, 1u);
      if (tile == tiles + gridDim.x - 1) atomicExch(next_tile, 0u);  // every block has found the list empty
      *shared = (int)tile;
    }
    __syncthreads();  // everyone sees the tile
    return *shared;
  }
};
