package tlspsk

import "fmt"

// An Alert is what a connection ends by (RFC 8446, section 6).
type Alert uint8

// Alerts that are sent, and those of which a name helps.
const (
	closeNotify          Alert = 0
	unexpectedMessage    Alert = 10
	badRecordMAC         Alert = 20
	recordOverflow       Alert = 22
	handshakeFailure     Alert = 40
	illegalParameter     Alert = 47
	accessDenied         Alert = 49
	decodeError          Alert = 50
	decryptError         Alert = 51
	protocolVersion      Alert = 70
	insufficientSecurity Alert = 71
	internalError        Alert = 80
	userCanceled         Alert = 90
	missingExtension     Alert = 109
	unsupportedExtension Alert = 110
	unknownPSKIdentity   Alert = 115
	certificateRequired  Alert = 116
)

var alertNames = map[Alert]string{
	closeNotify: "close_notify", unexpectedMessage: "unexpected_message", badRecordMAC: "bad_record_mac",
	recordOverflow: "record_overflow", handshakeFailure: "handshake_failure", illegalParameter: "illegal_parameter",
	accessDenied: "access_denied", decodeError: "decode_error", decryptError: "decrypt_error", protocolVersion: "protocol_version",
	insufficientSecurity: "insufficient_security", internalError: "internal_error", userCanceled: "user_canceled",
	missingExtension: "missing_extension", unsupportedExtension: "unsupported_extension",
	unknownPSKIdentity: "unknown_psk_identity", certificateRequired: "certificate_required",
}

func (a Alert) String() string {
	if s, ok := alertNames[a]; ok {
		return s
	}
	return fmt.Sprintf("alert %d", uint8(a))
}

// An Error is what one end has against the other.
type Error struct {
	Alert  Alert
	Remote bool // it came from the peer, who doesn't say more

	reason string
}

func (e *Error) Error() string {
	switch {
	case !e.Remote:
		return e.Alert.String() + ": " + e.reason
	case e.reason != "":
		return "the peer sent " + e.Alert.String() + ": " + e.reason
	}
	return "the peer sent " + e.Alert.String()
}

// fault is an Error of which the peer is to be told.
func fault(a Alert, reason string) error { return &Error{Alert: a, reason: reason} }
