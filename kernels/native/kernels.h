/* All kernels, for the instruction set of the including file. */
#include "simd.h"

#include "convolution.h"
#include "mlstm.h"
#include "slstm.h"
