#include "textflag.h"

// int localityC(uint32_t *locality, uint32_t tpm), in the convention of
// System V: it needs the arguments' registers and AX.
TEXT ·localityC(SB), NOSPLIT|NOFRAME, $0-0
	MOVL ·locality(SB), AX
	MOVL AX, (DI)
	XORL AX, AX
	RET

DATA ·localityPC(SB)/8, $·localityC(SB)
GLOBL ·localityPC(SB), NOPTR|RODATA, $8
