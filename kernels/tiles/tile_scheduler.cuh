// Who works on what: blocks draw items of work from a list, longest first, until none is left.
#pragma once
#include "../common/types.cuh"

// The next item for this block, or a number >= items when there is none. Every block draws until then; whoever draws last
// leaves `tickets` at 0 for the next launch. Results do not depend on who draws what.
DEVICE int draw_item(unsigned* tickets, int items, int* drawn) {
  __syncthreads();  // everyone is done with the shared memory of the item before
  if (threadIdx.x == 0) {
    const unsigned ticket = atomicAdd(tickets, 1u);
    if (ticket == items + gridDim.x - 1) atomicExch(tickets, 0u);
    *drawn = (int)ticket;
  }
  __syncthreads();  // everyone sees the item
  return *drawn;
}
