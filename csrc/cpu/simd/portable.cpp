#define NEQ_ISA portable
#define NEQ_TARGET
#include "table.h"
