// See cuda_runtime.h beside this.
#include "cuda_runtime.h"
