// Package live works on a machine that runs: it opens the store in the tail of
// the machine's disk through QEMU itself, takes and loads snapshots of disk,
// memory and state in one, and adds disks. It speaks QMP to QEMU.
//
// # Attaching
//
// Attach has QEMU export the node with the state window over NBD, on a socket
// that only this user can connect to and that takes one client, and opens the
// store there. What it adds to QEMU it takes away again, when it is closed or if
// it fails half-way; what a service that was killed left behind, the next one
// takes away.
//
//	a, err := live.Attach(ctx, "/run/vm1.qmp", &live.Options{
//		Reverted: func(r live.Revert) { device.Reload() },
//	})
//	...
//	defer a.Close()
//	err = a.Store().Put("net0/nvm", content, nil)
//
// # Snapshots
//
// Save and Load keep this project's writers out while QEMU works, those of other
// processes too, by locks on bytes of the image file that QEMU doesn't use. So a
// snapshot never cuts through a commit. One that somebody else takes, or loads,
// may; nothing that was acknowledged is lost by that, and the store notices (see
// package nvstore). An Attachment looks at the store whenever QEMU tells that a
// job ended or that the machine runs on, so that readers notice, too, and calls
// Options.Reverted. A service that opens the store by an export of its own
// passes a Gate.
//
// The human monitor's loadvm isn't for machines that somebody is attached to:
// QEMU 7.2 then leaves requests of the NBD client unanswered for good. What it
// and savevm do, Load and Save do by jobs.
//
// # No ring
//
// QEMU waits for its own block layer when it saves and loads snapshots. A service
// that QEMU waits for, such as a TPM, must never wait without bound on a store
// that it attached to in the same QEMU.
package live
