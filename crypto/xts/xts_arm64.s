//go:build arm64 && !purego

#include "textflag.h"

// In all that follows: R0 dst, R1 src, R2 tweaks, R3 sectors, R4 batches a
// sector, R5 round keys, R6 rounds. V16 to V30 hold the round keys, of which
// the last is always in V30: an instruction names its register, so shorter
// schedules leave a gap below V30. V0 to V7 are blocks, V8 to V15 their tweaks,
// R8 and R9 the low and high half of the tweak, R10 the polynomial.

// KEYS loads them. R5 and R11 are lost.
#define KEYS \
	VLD1.P 64(R5), [V16.B16, V17.B16, V18.B16, V19.B16]; \
	VLD1.P 64(R5), [V20.B16, V21.B16, V22.B16, V23.B16]; \
	VLD1.P 32(R5), [V24.B16, V25.B16]; \
	SUBS   $10, R6, R11; \
	BEQ    keyed; \
	VLD1.P 32(R5), [V26.B16, V27.B16]; \
	SUBS   $2, R11, R11; \
	BEQ    keyed; \
	VLD1.P 32(R5), [V28.B16, V29.B16]; \
keyed: \
	VLD1   (R5), [V30.B16]

// DOUBLE multiplies the tweak by x. R12 and R13 are lost.
#define DOUBLE \
	ASR  $63, R9, R12; \
	AND  R10, R12, R12; \
	LSR  $63, R8, R13; \
	ORR  R9<<1, R13, R9; \
	EOR  R8<<1, R12, R8

#define TWEAK(V) \
	VMOV R8, V.D[0]; \
	VMOV R9, V.D[1]; \
	DOUBLE

#define ROUND8(OP, MIX, K) \
	OP  K.B16, V0.B16; \
	MIX V0.B16, V0.B16; \
	OP  K.B16, V1.B16; \
	MIX V1.B16, V1.B16; \
	OP  K.B16, V2.B16; \
	MIX V2.B16, V2.B16; \
	OP  K.B16, V3.B16; \
	MIX V3.B16, V3.B16; \
	OP  K.B16, V4.B16; \
	MIX V4.B16, V4.B16; \
	OP  K.B16, V5.B16; \
	MIX V5.B16, V5.B16; \
	OP  K.B16, V6.B16; \
	MIX V6.B16, V6.B16; \
	OP  K.B16, V7.B16; \
	MIX V7.B16, V7.B16

#define LAST8(OP, K) \
	OP K.B16, V0.B16; \
	OP K.B16, V1.B16; \
	OP K.B16, V2.B16; \
	OP K.B16, V3.B16; \
	OP K.B16, V4.B16; \
	OP K.B16, V5.B16; \
	OP K.B16, V6.B16; \
	OP K.B16, V7.B16

#define XOR8(A, B, C, D, E, F, G, H) \
	VEOR A.B16, V0.B16, V0.B16; \
	VEOR B.B16, V1.B16, V1.B16; \
	VEOR C.B16, V2.B16, V2.B16; \
	VEOR D.B16, V3.B16, V3.B16; \
	VEOR E.B16, V4.B16, V4.B16; \
	VEOR F.B16, V5.B16, V5.B16; \
	VEOR G.B16, V6.B16, V6.B16; \
	VEOR H.B16, V7.B16, V7.B16

// CRYPT8 is every round on V0 to V7. R11 is lost.
#define CRYPT8(OP, MIX) \
	ROUND8(OP, MIX, V16); \
	ROUND8(OP, MIX, V17); \
	ROUND8(OP, MIX, V18); \
	ROUND8(OP, MIX, V19); \
	ROUND8(OP, MIX, V20); \
	ROUND8(OP, MIX, V21); \
	ROUND8(OP, MIX, V22); \
	ROUND8(OP, MIX, V23); \
	ROUND8(OP, MIX, V24); \
	SUBS $10, R6, R11; \
	BEQ  last10; \
	ROUND8(OP, MIX, V25); \
	ROUND8(OP, MIX, V26); \
	SUBS $2, R11, R11; \
	BEQ  last12; \
	ROUND8(OP, MIX, V27); \
	ROUND8(OP, MIX, V28); \
	LAST8(OP, V29); \
	B    crypted; \
last10: \
	LAST8(OP, V25); \
	B    crypted; \
last12: \
	LAST8(OP, V27); \
crypted: \
	XOR8(V30, V30, V30, V30, V30, V30, V30, V30)

#define BATCHES(OP, MIX) \
	MOVD dst+0(FP), R0; \
	MOVD src+8(FP), R1; \
	MOVD tweaks+16(FP), R2; \
	MOVD sectors+24(FP), R3; \
	MOVD batches+32(FP), R4; \
	MOVD rk+40(FP), R5; \
	MOVD rounds+48(FP), R6; \
	MOVD $0x87, R10; \
	KEYS; \
sector: \
	LDP.P 16(R2), (R8, R9); \
	MOVD R4, R7; \
loop: \
	TWEAK(V8); \
	TWEAK(V9); \
	TWEAK(V10); \
	TWEAK(V11); \
	TWEAK(V12); \
	TWEAK(V13); \
	TWEAK(V14); \
	TWEAK(V15); \
	VLD1.P 64(R1), [V0.B16, V1.B16, V2.B16, V3.B16]; \
	VLD1.P 64(R1), [V4.B16, V5.B16, V6.B16, V7.B16]; \
	XOR8(V8, V9, V10, V11, V12, V13, V14, V15); \
	CRYPT8(OP, MIX); \
	XOR8(V8, V9, V10, V11, V12, V13, V14, V15); \
	VST1.P [V0.B16, V1.B16, V2.B16, V3.B16], 64(R0); \
	VST1.P [V4.B16, V5.B16, V6.B16, V7.B16], 64(R0); \
	SUBS $1, R7, R7; \
	BNE  loop; \
	SUBS $1, R3, R3; \
	BNE  sector; \
	RET

#define BLOCKS(OP, MIX) \
	MOVD dst+0(FP), R0; \
	MOVD src+8(FP), R1; \
	MOVD tweak+16(FP), R2; \
	MOVD blocks+24(FP), R3; \
	MOVD rk+32(FP), R14; \
	MOVD rounds+40(FP), R6; \
	MOVD $0x87, R10; \
	LDP  (R2), (R8, R9); \
block: \
	TWEAK(V8); \
	VLD1.P 16(R1), [V0.B16]; \
	VEOR V8.B16, V0.B16, V0.B16; \
	MOVD R14, R5; \
	SUB  $1, R6, R7; \
round: \
	VLD1.P 16(R5), [V16.B16]; \
	OP   V16.B16, V0.B16; \
	MIX  V0.B16, V0.B16; \
	SUBS $1, R7, R7; \
	BNE  round; \
	VLD1 (R5), [V16.B16, V17.B16]; \
	OP   V16.B16, V0.B16; \
	VEOR V17.B16, V0.B16, V0.B16; \
	VEOR V8.B16, V0.B16, V0.B16; \
	VST1.P [V0.B16], 16(R0); \
	SUBS $1, R3, R3; \
	BNE  block; \
	STP  (R8, R9), (R2); \
	RET

// func encryptBatches(dst, src, tweaks *byte, sectors, batches int, rk *byte, rounds int)
TEXT ·encryptBatches(SB), NOSPLIT, $0-56
	BATCHES(AESE, AESMC)

// func decryptBatches(dst, src, tweaks *byte, sectors, batches int, rk *byte, rounds int)
TEXT ·decryptBatches(SB), NOSPLIT, $0-56
	BATCHES(AESD, AESIMC)

// func encryptBlocks(dst, src, tweak *byte, blocks int, rk *byte, rounds int)
TEXT ·encryptBlocks(SB), NOSPLIT, $0-48
	BLOCKS(AESE, AESMC)

// func decryptBlocks(dst, src, tweak *byte, blocks int, rk *byte, rounds int)
TEXT ·decryptBlocks(SB), NOSPLIT, $0-48
	BLOCKS(AESD, AESIMC)

// func encrypt8(buf, rk *byte, rounds int)
TEXT ·encrypt8(SB), NOSPLIT, $0-24
	MOVD buf+0(FP), R0
	MOVD rk+8(FP), R5
	MOVD rounds+16(FP), R6
	KEYS
	MOVD R0, R1
	VLD1.P 64(R1), [V0.B16, V1.B16, V2.B16, V3.B16]
	VLD1   (R1), [V4.B16, V5.B16, V6.B16, V7.B16]
	CRYPT8(AESE, AESMC)
	VST1.P [V0.B16, V1.B16, V2.B16, V3.B16], 64(R0)
	VST1   [V4.B16, V5.B16, V6.B16, V7.B16], (R0)
	RET

// func subWord(w uint32) uint32
// With the same word in every column, ShiftRows changes nothing.
TEXT ·subWord(SB), NOSPLIT, $0-12
	MOVWU w+0(FP), R0
	VDUP  R0, V0.S4
	VEOR  V1.B16, V1.B16, V1.B16
	AESE  V1.B16, V0.B16
	VMOV  V0.S[0], R0
	MOVW  R0, ret+8(FP)
	RET

// func invMixColumns(dst, src *byte)
TEXT ·invMixColumns(SB), NOSPLIT, $0-16
	MOVD   dst+0(FP), R0
	MOVD   src+8(FP), R1
	VLD1   (R1), [V0.B16]
	AESIMC V0.B16, V0.B16
	VST1   [V0.B16], (R0)
	RET
