// The platform that the kernels are compiled for.
#pragma once

#include "problem.h"

#ifdef __CUDACC__
#include "device.cuh"
#else
#include "host/shim.h"
#endif
