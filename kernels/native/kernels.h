/* All kernels, for the instruction set of the including file. */
#include "memory.h"
#include "simd.h"
#include "transpose.h"

#include "attention.h"
#include "mlstm.h"
#include "rotary.h"
