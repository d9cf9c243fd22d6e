/* All kernels, for the instruction set of the including file. */
#include "simd.h"

#include "mlstm.h"
#include "rows.h"
#include "step.h"
