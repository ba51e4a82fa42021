// Package luks opens and makes images encrypted with LUKS, version 1 and 2, as
// cryptsetup and QEMU do: a header with a volume key, wrapped by passphrases in
// key slots, and a payload of sectors encrypted with it.
//
// The formats are described in "LUKS On-Disk Format Specification" version
// 1.2.3 (LUKS1) and "LUKS2 On-Disk Format Specification" version 1.1.
//
// Everything in a header is taken for an attacker's: sizes and places are held
// against the image before anything is read, and what a key slot asks for in
// time and memory against a Budget before anything is computed.
//
// Encryption hides data. It doesn't authenticate: who can write to the image
// can damage sectors, or bring old ones back, without being noticed.
package luks
