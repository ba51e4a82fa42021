package control

import "fmt"

// A Command is the first word of a message.
type Command uint32

// Commands, in the order of their numbers.
const (
	GetCapability Command = 1 + iota
	Init
	Shutdown
	GetTPMEstablished
	SetLocality
	HashStart
	HashData
	HashEnd
	CancelTPMCmd
	StoreVolatile
	ResetTPMEstablished
	GetStateBlob
	SetStateBlob
	Stop
	GetConfig
	SetDataFD
	SetBufferSize
	GetInfo
	LockStorage
)

var commandNames = [...]string{"", "GET_CAPABILITY", "INIT", "SHUTDOWN", "GET_TPMESTABLISHED", "SET_LOCALITY",
	"HASH_START", "HASH_DATA", "HASH_END", "CANCEL_TPM_CMD", "STORE_VOLATILE", "RESET_TPMESTABLISHED",
	"GET_STATEBLOB", "SET_STATEBLOB", "STOP", "GET_CONFIG", "SET_DATAFD", "SET_BUFFERSIZE", "GET_INFO", "LOCK_STORAGE"}

// String returns the command's name, such as "GET_CAPABILITY".
func (c Command) String() string {
	if c >= 1 && int(c) < len(commandNames) {
		return commandNames[c]
	}
	return fmt.Sprintf("command %#x", uint32(c))
}

// A Result is a TPM_RESULT, the first word of a reply.
type Result uint32

// Results of the channel's own (libtpms/tpm_error.h).
const (
	Success      Result = 0
	BadParameter Result = 3  // the request is too short, too long or makes no sense
	Fail         Result = 9  // what was asked went wrong
	BadOrdinal   Result = 10 // no such command, or not while the TPM runs, or doesn't
	KeyNotFound  Result = 13 // the state is encrypted, and there is no key
	IOError      Result = 31
	DecryptError Result = 33 // the key is wrong
	BadVersion   Result = 46
	BadLocality  Result = 61
)

// Capability bits of GET_CAPABILITY.
const (
	capInit uint32 = 1 << iota
	capShutdown
	capGetEstablished
	capSetLocality
	capHashing
	capCancel
	capStoreVolatile
	capResetEstablished
	capGetState
	capSetState
	capStop
	capGetConfig
	capSetDataFD
	capSetBufferSize
	capGetInfo
	capSendCommandHeader
	capLockStorage
)

// flags of requests and replies.
const (
	initDeleteVolatile = 1 // of INIT
	stateDecrypted     = 1 // of GET_STATEBLOB
	stateEncrypted     = 2 // of its reply, and of SET_STATEBLOB
	configFileKey      = 1 // of GET_CONFIG
	configMigrationKey = 2
)

// Types of GET_STATEBLOB and SET_STATEBLOB are kinds of package tpmstate, from
// 1.
const firstType = 1
