#define NEQ_ISA portable
#define NEQ_TARGET
#define NEQ_REGISTER_BYTES 32
#include "table.h"
