/* All kernels, for the instruction set of the including file. */
#include "simd.h"

#include "activation.h"
#include "attention.h"
#include "linear.h"
#include "block_linear.h" /* after linear.h, which it takes sums from */
#include "convolution.h"
#include "gated_norm.h"
#include "mlstm.h"
#include "rms_norm.h"
#include "rotary.h"
#include "rows.h"
#include "slstm.h"
#include "some_rows.h" /* after linear.h, whose words it counts in */
#include "step.h"
#include "capped_step.h" /* after step.h, whose cell it has */
