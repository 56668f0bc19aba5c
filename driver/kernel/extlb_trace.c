// SPDX-License-Identifier: GPL-2.0
#include "extlb.h"

#define CREATE_TRACE_POINTS
#include "extlb_trace.h"
