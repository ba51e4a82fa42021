// Package swtpm reads and writes the files in which swtpm keeps a TPM's state,
// and the blobs that it hands out for migration, strictly: swtpm 0.7 to 0.11.
//
// A state file is a header of 10 bytes and a list of tag, length and value
// (swtpm_nvstore.c, tlv.h). The state in it is plain, or AES-CBC with
// HMAC-SHA256 over ciphertext and IV, under one key for both. A blob on the
// control channel wraps the same once more, for the migration key. A linear
// file ("file://") has a table of sections in front of up to three such files
// (swtpm_nvstore_linear.h); a folder ("dir://") has one file for each.
//
// swtpm accepts what it can make out; this package refuses what swtpm would
// not have written, so that damage is found where it can be. It can't be found
// in a plain state's own bytes: there is no checksum over them.
package swtpm
