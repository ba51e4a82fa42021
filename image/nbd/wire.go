package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"

	"nvstore.dev/image"
)

// Numbers of the protocol (proto.md, "Values").
const (
	magicServer     = 0x4e42444d41474943 // "NBDMAGIC"
	magicOption     = 0x49484156454f5054 // "IHAVEOPT"
	magicOldstyle   = 0x00420281861253
	magicOptReply   = 0x3e889045565a9
	magicRequest    = 0x25609513
	magicSimple     = 0x67446698
	magicStructured = 0x668e33ef

	flagFixedNewstyle = 1 << 0 // handshake and client flags
	flagNoZeroes      = 1 << 1

	flagHasFlags    = 1 << 0 // transmission flags
	flagReadOnly    = 1 << 1
	flagFlush       = 1 << 2
	flagFUA         = 1 << 3
	flagRotational  = 1 << 4
	flagTrim        = 1 << 5
	flagWriteZeroes = 1 << 6
	flagDF          = 1 << 7
	flagMultiConn   = 1 << 8
	flagCache       = 1 << 10
	flagFastZero    = 1 << 11
)

// Options of the handshake, the types of their replies, and what INFO tells.
const (
	optExportName      = 1
	optAbort           = 2
	optList            = 3
	optStartTLS        = 5
	optInfo            = 6
	optGo              = 7
	optStructuredReply = 8
	optListMeta        = 9
	optSetMeta         = 10

	repAck    = 1
	repServer = 2
	repInfo   = 3
	repMeta   = 4
	repError  = 1 << 31 // set in all errors

	repUnsup         = repError + 1
	repPolicy        = repError + 2
	repInvalid       = repError + 3
	repPlatform      = repError + 4
	repTLSRequired   = repError + 5
	repUnknown       = repError + 6
	repShutdown      = repError + 7
	repBlockSizeReqd = repError + 8
	repTooBig        = repError + 9

	infoExport      = 0
	infoName        = 1
	infoDescription = 2
	infoBlockSize   = 3
)

// Commands, their flags, and the chunks of structured replies.
const (
	cmdRead        = 0
	cmdWrite       = 1
	cmdDisc        = 2
	cmdFlush       = 3
	cmdTrim        = 4
	cmdCache       = 5
	cmdWriteZeroes = 6
	cmdBlockStatus = 7

	cmdFlagFUA      = 1 << 0
	cmdFlagNoHole   = 1 << 1
	cmdFlagDF       = 1 << 2
	cmdFlagReqOne   = 1 << 3
	cmdFlagFastZero = 1 << 4

	replyDone = 1 << 0 // in a chunk's flags

	chunkNone        = 0
	chunkData        = 1
	chunkHole        = 2
	chunkStatus      = 5
	chunkError       = 1<<15 + 1
	chunkErrorOffset = 1<<15 + 2
	chunkErrorBit    = 1 << 15

	stateHole = 1 << 0
	stateZero = 1 << 1
)

// Errors on the wire.
const (
	errPerm     = 1
	errIO       = 5
	errNoMem    = 12
	errInvalid  = 22
	errNoSpace  = 28
	errOverflow = 75
	errNotSup   = 95
	errShutdown = 108
)

// Limits.
const (
	maxString      = 4096     // bytes of a name or message (proto.md, "Conventions")
	maxPayload     = 32 << 20 // of a request or an option
	maxMinBlock    = 64 << 10
	maxReplies     = 1 << 16 // to one option
	contextAlloc   = "base:allocation"
	requestLen     = 28
	simpleLen      = 16
	structuredLen  = 20
	optionLen      = 16
	optReplyLen    = 20
	maxStatusBytes = 1 << 30 // asked for, or told, in one extent
)

var be = binary.BigEndian

// Kinds of errors beside those of package image.
var (
	// ErrProtocol: the peer sent what the protocol forbids. The connection
	// was closed.
	ErrProtocol = errors.New("nbd: protocol violation")
	// ErrRefused: the server declines the export or an option.
	ErrRefused = errors.New("nbd: refused by the server")
	// ErrTLSRequired: one side insists on TLS, and the other hasn't got it.
	ErrTLSRequired = errors.New("nbd: TLS is required")
	// ErrDisconnected: the connection was lost and could not be made again.
	ErrDisconnected = errors.New("nbd: disconnected")
	// ErrTimeout: the peer took too long. The connection was closed.
	ErrTimeout = errors.New("nbd: timed out")
	// ErrKey: a pre-shared key, or a file of them, that makes no sense.
	ErrKey = errors.New("nbd: invalid pre-shared key")
	// ErrURI: an NBD URI or address that makes no sense.
	ErrURI = errors.New("nbd: invalid address")
)

// A RemoteError is an error that the server answered a request with.
type RemoteError struct {
	Op      string // "read", "write", "flush", "trim", "write zeroes", "cache" or "block status"
	Off, N  int64  // the request's range, bytes
	Code    uint32 // on the wire: 5 is EIO (proto.md, "Error values")
	Message string // from the server, which may say anything; at most 4096 bytes
}

func (e *RemoteError) Error() string {
	s := fmt.Sprintf("nbd: %s of %d bytes at %d: server says %s", e.Op, e.N, e.Off, codeName(e.Code))
	if e.Message != "" {
		s += fmt.Sprintf(" (%q)", e.Message)
	}
	return s
}

// Unwrap returns the kind in package image that the code stands for, or nil.
func (e *RemoteError) Unwrap() error {
	switch e.Code {
	case errPerm:
		return image.ErrReadOnly
	case errNoSpace:
		return image.ErrNoSpace
	case errNotSup:
		return image.ErrUnsupported
	}
	return nil
}

func codeName(code uint32) string {
	switch code {
	case errPerm:
		return "operation not permitted"
	case errIO:
		return "input/output error"
	case errNoMem:
		return "out of memory"
	case errInvalid:
		return "invalid argument"
	case errNoSpace:
		return "no space left"
	case errOverflow:
		return "value too large"
	case errNotSup:
		return "not supported"
	case errShutdown:
		return "shutting down"
	}
	return fmt.Sprintf("error %d", code)
}

func opName(cmd uint16) string {
	names := []string{"read", "write", "disconnect", "flush", "trim", "cache", "write zeroes", "block status"}
	if int(cmd) < len(names) {
		return names[cmd]
	}
	return fmt.Sprintf("command %d", cmd)
}

// violation is a FormatError of kind ErrProtocol.
func violation(structure, field string, got any, want string) error {
	return &image.FormatError{Off: -1, Struct: "nbd " + structure, Field: field, Got: got, Want: want, Kind: ErrProtocol}
}

// clip bounds what the peer says before it is kept or shown.
func clip(p []byte) string {
	return strings.ToValidUTF8(string(p[:min(len(p), maxString)]), "\ufffd")
}
