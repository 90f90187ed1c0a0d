// The types of the driver's functions are with it.
#pragma once

#include "cuda.h"
