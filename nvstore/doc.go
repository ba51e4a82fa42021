// Package nvstore keeps the non-volatile state of a virtual machine's devices
// (TPM, UEFI variables, EEPROMs, VPD) as named blobs in one image: checksummed,
// sealed if wanted, and replaced atomically, so that a crash at any instant
// loses nothing that was acknowledged, and so that the state is snapshotted,
// reverted and moved together with the machine's disk.
//
// A store lies in a qcow2 or raw image, in a stack of such, or in a Pebble
// folder that holds many machines' state; the location given to Open and
// Create says which.
//
// # Promises
//
// When Update, Put, Delete, Rename or Blob.Sync returns nil, the change is
// durable. It is one commit: after a crash either all of it is there or none.
// A Put of bytes that are stored already writes nothing.
//
// What View reads doesn't change while it runs. Readers never wait for the
// writer, nor the writer for readers; updates wait for each other.
//
// If a snapshot is loaded underneath, or another writer comes, the next
// commit notices before it acknowledges anything, and returns ErrReverted;
// the store then shows the new state of things.
//
// After a failed write or Sync every call returns ErrPoisoned: what the
// medium holds is unknown. Open the store again; nothing that was
// acknowledged is lost.
//
// # Live extents
//
// A device inside of an emulator that reads and writes a range of the image
// itself has a blob as a live extent (Tx.CreateLive, Tx.SetLive): one plain
// piece at Entry.Offset, of at most 1 GiB, never encrypted. Store.Attach marks
// it as the device's before it opens it, and Store.Detach takes it back and
// records its checksum. In between the promises above are for other blobs.
package nvstore
