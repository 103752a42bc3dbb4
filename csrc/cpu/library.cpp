#include "parallel.h"

ParallelFor parallel_for = nullptr;

extern "C" void smi_use_threads(ParallelFor given) { parallel_for = given; }
