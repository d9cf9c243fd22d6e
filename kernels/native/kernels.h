/* All kernels, for the instruction set of the including file. */
#include "simd.h"

#include "linear.h"
#include "block_linear.h"
#include "gated_norm.h"
#include "mlstm.h"
