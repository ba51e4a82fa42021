// Package tpmstate keeps the state of an emulated TPM, 2.0 or 1.2, in a store:
// three blobs that are replaced atomically, checksummed, sealed if the store
// is, and durable when the call returns.
//
// What the blobs hold is the TPM implementation's own (libtpms' here) and
// opaque: permanent state (seeds, hierarchies, NV indices, persistent
// objects), volatile state (PCRs, sessions, loaded objects: what a running TPM
// has besides, written for suspend and migration), and the save state of a TPM
// 1.2 (TPM_SaveState). A TPM 2.0 has no save state.
//
// A Home is where they lie. NVRAM is the Home in a store of package nvstore;
// package tpmstate/swtpm has those in swtpm's own files.
package tpmstate
