// Package live keeps a TPM's state in a store that lies inside of the QEMU that
// the TPM serves.
//
// No request that QEMU waits for may wait for that QEMU without a bound. QEMU
// lets nobody at its block devices while it saves or loads a snapshot, and then
// waits for the TPM command that runs, and for the TPM's state. So a Home
// answers from memory, and a goroutine of its own brings what was stored to the
// store; who answers the TPM's client asks Ready before a command, and Durable
// after it.
//
// The store is compared with memory each time that it is opened. It is opened
// through QEMU (NBD) while QEMU has the image, and directly before and after,
// when QEMU's locks are free.
package live
